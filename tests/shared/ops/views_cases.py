"""Calls of views: pictures, views and parameters, drawn or by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.views import VIEW_PARAMS, ViewSpec, draw_views, view_specs

# Every step of a view, often.
STEPS: dict[str, Any] = {
    "scale": (0.1, 1.0),
    "gray_probability": 0.2,
    "blur_probability": 0.7,
    "solarize_probability": 0.4,
}
UNCHANGED: dict[str, Any] = {
    "jitter_probability": 0.0,
    "gray_probability": 0.0,
}


def group(size: int, count: int = 1, **settings: Any) -> ViewConfig:
    """Return views of a size that take every step; without a blur where a pixel has no other."""
    most = {"blur_probability": 0.0} if size == 1 else {}
    return ViewConfig(size=size, count=count, **{**STEPS, **most, **settings})


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of one call: height and width of each picture of each sample, and the views."""

    pictures: Sequence[Sequence[tuple[int, int]]]
    groups: Sequence[ViewConfig]
    seed: int = 0
    specs: tuple[ViewSpec, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "specs", view_specs(*self.groups))


CASES = {
    "plain": Case(pictures=[[(40, 50)]], groups=[group(32, **UNCHANGED)]),
    "two sizes, every step": Case(
        pictures=[[(40, 50)], [(37, 23)], [(64, 48)]],
        groups=[group(32, 2), group(12, 3, interpolation="linear")],
    ),
    "odd pictures": Case(
        pictures=[[(1, 1)], [(1, 70)], [(90, 1)], [(33, 35)], [(5, 3)]],
        groups=[group(33), group(13, 2), group(1)],
    ),
    "larger views than pictures": Case(
        pictures=[[(6, 5)], [(2, 2)]], groups=[group(70), group(41, interpolation="linear")]
    ),
    # 32 columns of a warp, eight rows of the crop at once, runs of seven: each and one more.
    "larger than a tile by one": Case(
        pictures=[[(17, 33)], [(9, 65)]],
        groups=[group(size, scale=(1.0, 1.0)) for size in (7, 8, 33, 57)],
    ),
    # Rows of the view, columns, and rows of the crop in pieces (policy.cu has their numbers).
    "crops too tall for all weights": Case(
        pictures=[[(2600, 4)], [(300, 420)]],
        groups=[group(8, scale=(1.0, 1.0)), group(2, interpolation="linear", scale=(1.0, 1.0))],
    ),
    "a crop too wide for all columns": Case(
        pictures=[[(2, 3000)]], groups=[group(90, scale=(1.0, 1.0), ratio=(1000.0, 1000.0))]
    ),
    "two pictures a sample": Case(
        pictures=[[(40, 50), (23, 61)], [(30, 30), (64, 20)]], groups=[group(16, 2), group(12)]
    ),
    "blurred out of scratch memory": Case(
        pictures=[[(10, 12)], [(11, 9)]],
        groups=[group(90, blur_probability=1.0, blur_kernel_size=179, blur_sigma=(20.0, 30.0))],
    ),
    "no samples": Case(pictures=[], groups=[group(8)]),
}


def make(case: Case, shift: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pixels, offset, image_size and drawn params; `shift`: bytes before each picture."""
    generator = torch.Generator().manual_seed(case.seed)
    parts, offsets, begin = [], [], 0
    for sizes in case.pictures:
        for height, width in sizes:
            begin += shift
            offsets.append(begin)
            begin += 3 * height * width
            parts.append(
                torch.randint(
                    256, (shift + 3 * height * width,), dtype=torch.uint8, generator=generator
                )
            )
    num_samples = len(case.pictures)
    num_pictures = len(case.pictures[0]) if case.pictures else 1
    pixels = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    offset = torch.tensor(offsets, dtype=torch.int64).view(num_samples, num_pictures)
    image_size = torch.tensor(case.pictures, dtype=torch.int64)
    image_size = image_size.view(num_samples, num_pictures, 2)
    position = torch.arange(num_samples) + 5
    params = draw_views(image_size, position, seed=case.seed, views=case.specs)
    return pixels, offset, image_size, params


def row(**values: float) -> Tensor:
    """Return one row of parameters in which only `values` and the crop change anything."""
    unchanged = {"height": 1.0, "width": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    return torch.tensor([{**unchanged, **values}.get(name, 0.0) for name in VIEW_PARAMS])
