"""dcnv3 against float64 arithmetic, torchvision's deformable convolution and grid_sample."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.ops import dcnv3, reference
from tests.shared.ops.cpu_capability import run_held_to
from tests.shared.ops.dcnv3_cases import (
    GRID,
    KERNELS,
    MANY_IMAGES,
    SHAPES,
    Config,
    assert_right,
    grid,
    make,
    results,
)

HALVES = (torch.bfloat16, torch.float16)


def test_the_grid_has_500_configurations() -> None:
    assert sum(len(list(grid(*part))) for part in GRID) >= 500


@pytest.mark.parametrize(("kernel", "stride", "dilation"), GRID)
def test_as_accurate_as_torch(kernel: tuple[int, int], stride: int, dilation: int) -> None:
    for config in grid(kernel, stride, dilation):
        assert_right(dcnv3, config, torch.float32)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_as_accurate_as_torch_in_other_types(kernel: tuple[int, int], dtype: torch.dtype) -> None:
    for config in itertools.islice(grid(kernel, 1, 1), 0, None, 2):
        assert_right(dcnv3, config, dtype)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(config: Config, dtype: torch.dtype) -> None:
    assert_right(dcnv3, config, dtype)


def test_every_image_is_its_own() -> None:
    """64 x 14 x 14 x 512, which a block of threads that straddles two images gets wrong."""
    config = Config(batch=64, image=(14, 14), groups=16, group_size=32)
    inputs, _ = make(config)
    whole = dcnv3(*inputs, **config.options)
    for image in range(0, 64, 7):
        part = [tensor[image : image + 1] for tensor in inputs]
        assert torch.equal(dcnv3(*part, **config.options), whole[image : image + 1])


# ---- Outside oracles -----------------------------------------------------------------------------

ORACLE_CASES = {
    "3 x 3": Config(),
    "3 x 5, stride, dilation, padding, scale": Config(
        kernel=(3, 5), stride=(2, 1), dilation=(1, 2), padding=(2, 3), offset_scale=2.0
    ),
    "2 x 2": Config(kernel=(2, 2), padding=(1, 0), offset_scale=0.5),
    "5 x 3, far": Config(kernel=(5, 3), padding=(0, 2), reach=10.0, groups=3, group_size=5),
    "without centre, softmax": Config(remove_center=True, softmax=True, dilation=(1, 2)),
    "even, dilation 3": Config(kernel=(4, 2), dilation=3, padding=(4, 4), image=(8, 9)),
}


def undeformed(config: Config) -> Tensor:  # [Ho, Wo, K, 2]
    """(x, y) of each point without offsets, as a convolution has them, x-major."""
    rows, columns = config.kernel
    kernel, stride, padding, dilation = config.arguments[:4]
    points = torch.tensor(
        [
            (i * dilation[1], j * dilation[0])
            for i in range(columns)
            for j in range(rows)
            if not (config.remove_center and (i, j) == (columns // 2, rows // 2))
        ]
    )
    index = [torch.arange(size) for size in config.out_image]
    y, x = torch.meshgrid(index[0] * stride[0], index[1] * stride[1], indexing="ij")
    corner = torch.stack((x - padding[1], y - padding[0]), dim=-1)
    return (corner[:, :, None] + points).double()


def deformed(config: Config, offset: Tensor) -> Tensor:  # [N, Ho, Wo, G, K, 2]
    """(x, y) of each point: a window stretched around its middle pixel, and offsets with it."""
    grid_YXK2 = undeformed(config)
    dilation = config.arguments[3]
    middle = torch.tensor([dilation[d] * (config.kernel[d] - 1) // 2 for d in (1, 0)])
    first = undeformed(Config(**{**vars_of(config), "remove_center": False}))[:, :, :1]
    centre = first + middle
    offset = offset.unflatten(-1, (config.groups, config.points, 2))
    centre, grid_YXK2 = centre[:, :, None], grid_YXK2[:, :, None]
    return centre + (grid_YXK2 - centre + offset) * config.offset_scale


def vars_of(config: Config) -> dict[str, object]:
    return {name: getattr(config, name) for name in Config.__slots__}


def by_torchvision(x: Tensor, offset: Tensor, mask: Tensor, config: Config) -> Tensor:
    """A depthwise deformable convolution with a weight of ones; the centre's mask is zero."""
    from torchvision.ops import deform_conv2d  # tests on a GPU do without it

    rows, columns = config.kernel
    shift = deformed(config, offset) - undeformed(config)[:, :, None]
    mask = mask.unflatten(-1, (config.groups, config.points))
    if config.softmax:
        mask = mask.softmax(dim=-1)
    if config.remove_center:
        at = columns // 2 * rows + rows // 2
        shift, mask = (
            torch.cat(
                (t[:, :, :, :, :at], torch.zeros_like(t[:, :, :, :, :1]), t[:, :, :, :, at:]), 4
            )
            for t in (shift, mask)
        )
    shift = shift.flip(-1).unflatten(4, (columns, rows)).transpose(4, 5)  # (y, x), row by row
    mask = mask.unflatten(4, (columns, rows)).transpose(4, 5)
    channels = x.shape[3]
    out = deform_conv2d(
        x.permute(0, 3, 1, 2),
        shift.permute(0, 3, 4, 5, 6, 1, 2).flatten(1, 4),
        x.new_ones(channels, 1, rows, columns),
        **{
            name: tuple(pair)
            for name, pair in zip(
                ("stride", "padding", "dilation"), config.arguments[1:4], strict=True
            )
        },
        mask=mask.permute(0, 3, 4, 5, 1, 2).flatten(1, 3),
    )
    return out.permute(0, 2, 3, 1)


def by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor, config: Config) -> Tensor:
    """One image for each group and one row of samples for each pixel."""
    batch, height, width, _ = x.shape
    size = torch.tensor([width, height])
    place = deformed(config, offset)  # [N, Ho, Wo, G, K, 2]
    place = (2 * place + 1) / size - 1
    image = x.unflatten(-1, (config.groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    sample = F.grid_sample(
        image, place.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(1, 2), align_corners=False
    )  # [N*G, D, Ho*Wo, K]
    mask = mask.unflatten(-1, (config.groups, config.points))
    if config.softmax:
        mask = mask.softmax(dim=-1)
    mask = mask.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
    out = (sample * mask[:, None]).sum(-1).unflatten(-1, config.out_image)
    return out.unflatten(0, (batch, config.groups)).permute(0, 3, 4, 1, 2).flatten(3)


@pytest.mark.parametrize("oracle", [by_torchvision, by_grid_sample])
@pytest.mark.parametrize("config", ORACLE_CASES.values(), ids=ORACLE_CASES.keys())
def test_agrees_with_other_operators(config: Config, oracle: object) -> None:
    inputs, grad_out = make(config, torch.float64)
    theirs = results(lambda *leaves: oracle(*leaves, config), inputs, grad_out)
    for op in (dcnv3, reference.dcnv3):
        for ours, expected in zip(
            results(op, inputs, grad_out, **config.options), theirs, strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def test_points_go_column_by_column() -> None:
    x = torch.randn(1, 5, 8, 1)
    for k, (i, j) in enumerate((i, j) for i in range(5) for j in range(3)):
        mask = torch.zeros(1, 3, 4, 15)
        mask[..., k] = 1
        offset = torch.zeros(1, 3, 4, 30)
        out = dcnv3(
            *(x, offset, mask), kernel_size=(3, 5), stride=1, padding=0, dilation=1, groups=1
        )
        assert torch.equal(out, x[:, j : j + 3, i : i + 4])


def test_without_offsets_it_averages_the_window() -> None:
    """As an untrained layer does: all logits are zero."""
    x = torch.randn(2, 6, 7, 32)
    offset, logits = torch.zeros(2, 6, 7, 36), torch.zeros(2, 6, 7, 18)
    out = dcnv3(
        *(x, offset, logits),
        **{"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1},
        groups=2,
        softmax=True,
    )
    expected = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def assert_halves_round_as_torch(dtype: torch.dtype) -> None:
    """Every value of 16 bits times a weight, multiplied in float32 and rounded once, bit by bit.

    Zeros lie between the pixels, since a corner without weight still multiplies what is there.
    """
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, -1, 16)
    x = torch.stack((values, torch.zeros_like(values)), dim=3).flatten(2, 3)
    generator = torch.Generator().manual_seed(0)
    mask = torch.randn(1, 1, values.shape[2], 1, generator=generator).to(dtype)
    geometry = {"kernel_size": 1, "stride": 2, "padding": 0, "dilation": 1, "groups": 1}
    out = dcnv3(x, torch.zeros(1, 1, values.shape[2], 2, dtype=dtype), mask, **geometry)
    expected = (values.float() * mask.float() + 0).to(dtype)  # a sum has no negative zero
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(out.view(torch.int16)[number], expected.view(torch.int16)[number])


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_round_as_torch(dtype: torch.dtype) -> None:
    assert_halves_round_as_torch(dtype)


# ---- Instruction sets and size -------------------------------------------------------------------

_OTHER_SETS = """
import itertools
import torch
from tests.ops.dcnv3.test_dcnv3 import assert_halves_round_as_torch
from tests.shared.ops.dcnv3_cases import SHAPES, assert_right, grid
from m3i_fast.ops import dcnv3
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for part in (((3, 3), 1, 1), ((3, 5), 2, 2)):
        for config in itertools.islice(grid(*part), 14):
            assert_right(dcnv3, config, dtype)
for name in ("batch 2", "32 channels: two rows a block", "100 channels a group", "scale 0.7"):
    assert_right(dcnv3, SHAPES[name], torch.float32)
for dtype in (torch.bfloat16, torch.float16):
    assert_halves_round_as_torch(dtype)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_are_as_accurate(capability: str) -> None:
    run_held_to(capability, _OTHER_SETS)


def test_more_images_than_16_bits_count() -> None:
    assert_right(dcnv3, MANY_IMAGES, torch.float32)


@pytest.mark.matrix
def test_more_than_2_to_the_31_elements() -> None:
    """Zeros that the system maps only where they are written: the last image alone takes memory."""
    batch, size = 2**15 + 3, 8
    x = torch.from_numpy(np.zeros((batch, size, size, 1024), np.uint16)).view(torch.bfloat16)
    assert x.numel() > 2**31
    x[-1] = torch.randn(size, size, 1024).bfloat16()
    config = Config(groups=16, kernel=(3, 3), stride=8)
    offset, mask = torch.randn(batch, 1, 1, 288).bfloat16(), torch.rand(batch, 1, 1, 144).bfloat16()
    out = dcnv3(x, offset, mask, **config.options)
    last = [tensor[-1:] for tensor in (x, offset, mask)]
    assert torch.equal(out[-1:], dcnv3(*last, **config.options)) and out[-1].any()
    assert not out[:-1].any()
