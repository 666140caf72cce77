"""One view by our kernels, and by torchvision on uint8 tensors, of the same parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from torch import Tensor
from torchvision.transforms import InterpolationMode

from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.views import VIEW_PARAMS, ViewSpec, make_views, view_specs

Box = tuple[int, int, int, int]
IDENTITY = dict.fromkeys(VIEW_PARAMS, 0.0) | dict.fromkeys(
    ("brightness", "contrast", "saturation"), 1.0
)
FILTERS = {True: InterpolationMode.BICUBIC, False: InterpolationMode.BILINEAR}
# torch resizes bytes by integers, and fuses a product and a sum, from AVX2 on.
exact = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's kernels for other processors round otherwise",
)


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """Random bytes: every rounding is met."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=rng)


def smooth(height: int, width: int, seed: int = 0) -> Tensor:
    """Colours that change slowly, as in a photo, some of them clipped."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, -(-height // 12), -(-width // 12), generator=rng)
    fine = F.interpolate(coarse, (height, width), mode="bicubic").mul(1.2).sub(0.1)
    return fine.clamp(0, 1).mul(255).byte()[0].permute(1, 2, 0).contiguous()


def spec(size: int, **settings: Any) -> ViewSpec:
    return view_specs(ViewConfig(count=1, size=size, **settings))[0]


def row(box: Box, **changes: float) -> Tensor:
    """The parameters of a view, [13] float32."""
    y, x, height, width = box
    numbers = IDENTITY | {"y": y, "x": x, "height": height, "width": width} | changes
    return torch.tensor([numbers[name] for name in VIEW_PARAMS])


def ours(image: Tensor, params: Tensor, view: ViewSpec) -> Tensor:  # [3, S, S] uint8
    (made,) = make_views(
        image.reshape(-1),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([[image.shape[:2]]]),
        params.view(1, 1, -1),
        views=[view],
    )
    return made[0]


def by_torchvision(
    image: Tensor, params: Tensor, view: ViewSpec, sides: tuple[int, int] | None = None
) -> Tensor:  # [3, H, W] uint8
    """The same, by torchvision, one function a step; sides: in the place of the view's size."""
    p = dict(zip(VIEW_PARAMS, params.tolist(), strict=True))
    box = [int(p[name]) for name in ("y", "x", "height", "width")]
    height, width, blur, _ = view.geometry(*sides or ())
    size = [height, width]
    made = tv.resized_crop(
        image.permute(2, 0, 1), *box, size, interpolation=FILTERS[view.cubic], antialias=True
    )
    if p["flip"]:
        made = tv.horizontal_flip(made)
    steps = (
        (tv.adjust_brightness, p["brightness"], 1),
        (tv.adjust_contrast, p["contrast"], 1),
        (tv.adjust_saturation, p["saturation"], 1),
        (tv.adjust_hue, p["hue"], 0),
    )
    for step, factor, nothing in list(itertools.permutations(steps))[int(p["order"])]:
        if factor != nothing:
            made = step(made, factor)
    if p["gray"]:
        made = tv.rgb_to_grayscale(made, 3)
    if p["sigma"]:
        made = tv.gaussian_blur(made, [blur] * 2, [p["sigma"]] * 2)
    if p["solarize"]:
        made = tv.solarize(made, 128)
    return made


def differences(a: Tensor, b: Tensor) -> tuple[int, float]:
    """The largest, in levels, and the share of values that differ at all."""
    apart = (a.int() - b.int()).abs()
    return int(apart.max()), float((apart > 0).float().mean())
