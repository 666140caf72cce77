"""Configurations of dcnv3 and their inputs, for the tests of its kernels on every device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3i_fast.ops import reference
from tests.shared.tolerance import assert_as_accurate

# How often torch's error, and how many units in the last place beyond it, are allowed. One rounding
# decides in a half type, many in float32; in float64 torch's own result is all there is.
ALLOWED = {
    torch.bfloat16: {"times": 1.0, "ulps": 0.25},
    torch.float16: {"times": 1.0, "ulps": 0.25},
    torch.float32: {"times": 2.0, "ulps": 1.0},
    torch.float64: {"times": 1.0, "ulps": 32.0},
}

# Gradients by the offset jump where a sample lies on a row or column of pixels.
MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    batch: int = 2
    image: tuple[int, int] = (6, 7)
    groups: int = 2
    group_size: int = 16
    kernel: tuple[int, int] = (3, 3)
    stride: int | tuple[int, int] = 1
    padding: tuple[int, int] = (1, 1)
    dilation: int | tuple[int, int] = 1
    offset_scale: float = 1.0
    remove_center: bool = False
    softmax: bool = False
    reach: float = 1.5
    """Offsets are normal, with this deviation, in pixels."""

    @property
    def points(self) -> int:
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "offset_scale": self.offset_scale,
            "remove_center": self.remove_center,
            "softmax": self.softmax,
        }

    @property
    def arguments(self) -> list[Any]:
        """The operator's arguments after the tensors."""
        pairs = (self.kernel, self.stride, self.padding, self.dilation)
        rest = (self.groups, self.offset_scale, self.remove_center, self.softmax)
        return [*(list(pair) if isinstance(pair, tuple) else [pair] * 2 for pair in pairs), *rest]

    @property
    def out_image(self) -> tuple[int, int]:
        kernel, stride, padding, dilation = self.arguments[:4]
        rows, columns = (
            (self.image[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d in (0, 1)
        )
        return rows, columns


KERNELS = ((1, 1), (2, 2), (3, 3), (5, 5), (3, 5))
GRID = list(itertools.product(KERNELS, (1, 2), (1, 2)))

# What people have met with other implementations of this operator.
SHAPES = {
    "batch 504": Config(batch=504, image=(3, 4), groups=1, group_size=4),
    "batch 2": Config(batch=2, image=(56, 56), groups=4),
    "batch 3, odd sizes": Config(batch=3, image=(13, 17), groups=3, group_size=20),
    "stride 2": Config(image=(14, 14), stride=2, groups=4),
    "stride 3 x 2": Config(image=(14, 15), stride=(3, 2), groups=2),
    "dilation 3 x 1": Config(image=(9, 9), padding=(3, 1), dilation=(3, 1)),
    "kernel 7": Config(image=(9, 8), kernel=(7, 7), padding=(3, 3)),
    "kernel 4 x 1": Config(image=(9, 8), kernel=(4, 1), padding=(2, 0)),
    "32 x 14 channels at 14 x 14": Config(batch=2, image=(14, 14), groups=16, group_size=32),
    "wide: several blocks a row": Config(batch=1, image=(3, 300), groups=1),
    "large: planes of one group at a time": Config(batch=1, image=(130, 140)),
    "32 channels: two rows a block": Config(batch=2, image=(14, 14), groups=3, group_size=32),
    "one pixel": Config(batch=1, image=(1, 1), groups=1),
    "padding larger than the image": Config(image=(2, 3), padding=(6, 5)),
    "more padding than reach": Config(batch=1, image=(3, 3), padding=(20, 20), groups=1),
    "scale 0.7": Config(offset_scale=0.7, dilation=2, padding=(2, 2)),
    "100 channels a group": Config(group_size=100, groups=1),
    "no image": Config(batch=0),
}

# More images than a CUDA grid has rows (65,535).
MANY_IMAGES = Config(batch=65_537, image=(1, 1), groups=1, group_size=4)


def grid(kernel: tuple[int, int], stride: int, dilation: int) -> Iterator[Config]:
    """Scales, group sizes and centres; what remains goes round, so that all meet all."""
    paddings = ((2, 1), (1, 3), (0, 4), (3, 3)) if dilation == 1 else ((3, 4), (4, 2))
    turn = {
        "padding": itertools.cycle(paddings),
        "image": itertools.cycle(((6, 7), (5, 5), (9, 6), (5, 11), (7, 8))),
        "softmax": itertools.cycle((False, True, True, False, True)),
        "reach": itertools.cycle((1.5, 0.4, 1.5, 30.0, 3.0, 1.0, 8.0)),
        "batch": itertools.cycle((2, 1, 3)),
        "groups": itertools.cycle((2, 1, 3, 2)),
    }
    centres = (False, True) if kernel[0] % 2 and kernel[1] % 2 and kernel != (1, 1) else (False,)
    for scale, size, remove_center in itertools.product(
        (0.5, 1.0, 2.0), (1, 8, 15, 16, 30, 32, 64), centres
    ):
        yield Config(
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            offset_scale=scale,
            group_size=size,
            remove_center=remove_center,
            **{name: next(values) for name, values in turn.items()},
        )


def _place(config: Config, offset: Tensor) -> Tensor:  # [..., G*K*2] to [..., G, K, 2] (x, y)
    """Fractions of a pixel apart from an integer, where each point samples."""
    rows, columns = config.kernel
    points = [(i, j) for i in range(columns) for j in range(rows)]
    if config.remove_center:
        points.remove((columns // 2, rows // 2))
    dilation = config.arguments[3]
    grid_K2 = torch.tensor(points, dtype=torch.float64) * torch.tensor(dilation[::-1])
    half = torch.tensor([dilation[1] * (columns - 1) // 2, dilation[0] * (rows - 1) // 2])
    shape = (*offset.shape[:-1], config.groups, config.points, 2)
    return (grid_K2 - half + offset.double().view(shape)) * config.offset_scale


def _away_from_pixels(config: Config, offset: Tensor) -> Tensor:
    """The same offsets, those that lead to a row or column of pixels halved and shifted."""
    for shift in (0.3, 0.15, 0.5, 1.1, 0.2, 0.7, 0.9, 0.4):
        place = _place(config, offset)
        close = ((place - place.round()).abs() < MARGIN).view(offset.shape)
        offset = torch.where(close, offset / 2 + shift, offset)
    assert not close.any()
    return offset


def make(
    config: Config, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """x, offset, mask, and a gradient of the output; on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, points = config.groups * config.group_size, config.groups * config.points
    place = (config.batch, *config.out_image)
    x = normal(config.batch, *config.image, channels).to(dtype)
    offset = _away_from_pixels(config, (normal(*place, points * 2) * config.reach).to(dtype))
    mask = normal(*place, points).to(dtype)
    return (x, offset, mask), normal(*place, channels).to(dtype)


def results(
    op: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor, **options: Any
) -> list[Tensor]:
    """The output, and the gradients by all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = op(*leaves, **options)
    out.backward(grad_out.to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_right(
    op: Callable[..., Tensor], config: Config, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Values and gradients are off by no more than ALLOWED.

    Plain torch computes in float32 (float64 for float64) and rounds once, as the kernels do.
    """
    inputs, grad_out = make(config, dtype)
    ours = results(op, tuple(t.to(device) for t in inputs), grad_out.to(device), **config.options)
    torchs = results(
        reference.dcnv3,
        inputs,
        grad_out,
        **config.options,
        compute_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    truth = results(
        reference.dcnv3, tuple(t.double() for t in inputs), grad_out.double(), **config.options
    )
    for name, our, its, true in zip(
        ("out", "grad_x", "grad_offset", "grad_mask"), ours, torchs, truth, strict=True
    ):
        try:
            assert_as_accurate(our.cpu(), its, true, **ALLOWED[dtype])
        except AssertionError as error:
            raise AssertionError(f"{name} of {config}: {error}") from error
