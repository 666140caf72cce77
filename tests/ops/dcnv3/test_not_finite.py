"""dcnv3 hides no NaN: what is not finite in its input makes its output NaN, and nothing else's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m3i_fast.ops import dcnv3, reference
from tests.ops.dcnv3.test_dcnv3 import by_grid_sample
from tests.shared.ops.cpu_capability import run_held_to
from tests.shared.ops.dcnv3_cases import Config, make, results

BAD = (torch.nan, torch.inf, -torch.inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONFIG = Config(batch=3, image=(5, 6), groups=3, group_size=10, offset_scale=2.0)
OUTSIDE = 1000.0
NAMES = ("out", "grad_x", "grad_offset", "grad_mask")


def _lost(config: Config, share: float) -> Tensor:  # [N, Ho, Wo, G, K] bool
    """Points of the second image and group that are spoilt; the others have none."""
    generator = torch.Generator().manual_seed(1)
    shape = (config.batch, *config.out_image, config.groups, config.points)
    lost = torch.rand(shape, generator=generator) < share
    lost[[0, 2]] = False
    lost[:, :, :, [0, 2]] = False
    return lost


def _pairs(lost: Tensor, x: bool, y: bool) -> Tensor:  # [N, Ho, Wo, G*K*2] bool
    return (lost[..., None] & torch.tensor([x, y])).flatten(-3)


def assert_only_theirs(config: Config, dtype: torch.dtype, bad: float, x: bool, y: bool) -> None:
    """NaN in what a bad offset touches; all else as if its point were outside, bit for bit."""
    (image, offset, mask), grad_out = make(config, dtype)
    lost = _lost(config, 0.2)
    spoilt = torch.where(_pairs(lost, x, y), bad, offset)
    outside = torch.where(_pairs(lost, True, True), OUTSIDE, offset)
    ours = results(dcnv3, (image, spoilt, mask), grad_out, **config.options)
    clean = results(dcnv3, (image, outside, mask), grad_out, **config.options)
    units = lost.any(-1)  # [N, Ho, Wo, G]
    first = torch.zeros(*image.shape[:3], config.groups, dtype=torch.bool)
    first[:, 0, 0] = units.any(1).any(1)
    of_points = units[..., None].expand_as(lost) if config.softmax else lost
    touched = (
        units.repeat_interleave(config.group_size, -1),
        first.repeat_interleave(config.group_size, -1),
        _pairs(lost, True, True),
        of_points.flatten(-2),
    )
    for name, our, other, where in zip(NAMES, ours, clean, touched, strict=True):
        assert where.any() and our[where].isnan().all(), name
        assert not other.isnan().any() and torch.equal(our[~where], other[~where]), name


def assert_as_the_reference(config: Config, inputs: tuple[Tensor, ...], grad_out: Tensor) -> None:
    """Not finite where float64 arithmetic is not, and nowhere else."""
    ours = results(dcnv3, inputs, grad_out, **config.options)
    wide = tuple(tensor.double() for tensor in inputs)
    truth = results(reference.dcnv3, wide, grad_out.double(), **config.options)
    for name, our, true in zip(NAMES, ours, truth, strict=True):
        finite = true.isfinite()
        assert torch.equal(our.isfinite(), finite), name
        torch.testing.assert_close(our[finite].double(), true[finite], rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_an_offset_that_is_not_finite(bad: float, softmax: bool) -> None:
    config = replace(CONFIG, softmax=softmax)
    for x, y in ((True, True), (True, False), (False, True)):
        assert_only_theirs(config, torch.float32, bad, x, y)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_an_offset_that_is_not_finite_in_other_types(dtype: torch.dtype) -> None:
    for group_size in (1, 16, 40):
        for bad in BAD:
            assert_only_theirs(replace(CONFIG, group_size=group_size), dtype, bad, True, False)


def test_offsets_of_both_signs_of_infinity_do_not_cancel() -> None:
    (x, offset, mask), _ = make(CONFIG)
    offset[1, 2, 3, :2] = torch.tensor([torch.inf, -torch.inf])
    assert dcnv3(x, offset, mask, **CONFIG.options)[1, 2, 3, :10].isnan().all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("reach", [1.0, OUTSIDE])
def test_a_mask_that_is_not_finite(reach: float, bad: float, softmax: bool) -> None:
    """Also of a point outside: no weight makes a NaN of its zero a number."""
    config = replace(CONFIG, softmax=softmax, offset_scale=1.0, reach=reach)
    (x, offset, mask), grad_out = make(config)
    mask = torch.where(_lost(config, 0.2).flatten(-2), bad, mask)
    assert_as_the_reference(config, (x, offset, mask), grad_out)
    if softmax and bad == -torch.inf:  # no weight at all
        assert not dcnv3(x, offset, mask, **config.options).isnan().any()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bad", BAD)
def test_an_image_that_is_not_finite(bad: float) -> None:
    """Where a sample reads the pixel, and nowhere else."""
    (x, offset, mask), grad_out = make(CONFIG)
    x[1, 2, 3, 12:15], x[2, 0, 0, 0] = bad, bad
    assert_as_the_reference(CONFIG, (x, offset, mask), grad_out)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("what", ["x", "mask"])
def test_as_grid_sample(what: str, bad: float) -> None:
    """Of a bad image or mask; grid_sample itself takes a NaN place for -1 and hides it."""
    config = replace(CONFIG, reach=2.0)
    (x, offset, mask), _ = make(config, torch.float64)
    if what == "x":
        x[1, 2, 3, 12:15] = bad
    else:
        mask = torch.where(_lost(config, 0.3).flatten(-2), bad, mask)
    theirs = by_grid_sample(x, offset, mask, config)
    ours = dcnv3(x, offset, mask, **config.options)
    finite = theirs.isfinite()
    assert not finite.all() and torch.equal(ours.isfinite(), finite)
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bad", BAD)
def test_the_reference_is_bilinear_arithmetic(bad: float) -> None:
    """One point, all of it written out: x - floor(x) has no value, and the sum of its corners none.

    A point at no pixel has no corner either: it stands at the first one, which is NaN by x.
    """
    weight = torch.tensor(bad, dtype=torch.float64) - torch.tensor(bad, dtype=torch.float64).floor()
    assert weight.isnan()
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 2, 3, 1)
    offset = torch.zeros(1, 2, 3, 2, dtype=torch.float64)
    offset[0, 1, 1, 0] = bad
    geometry = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    for op in (reference.dcnv3, dcnv3):
        ones = torch.ones(1, 2, 3, 1, dtype=torch.float64)
        out, *grads = results(op, (x, offset, ones), ones, **geometry)
        assert out.isnan().flatten().tolist() == [False] * 4 + [True, False]
        assert grads[0].isnan().flatten().tolist() == [True] + [False] * 5
        assert grads[1].isnan().view(6, 2).all(1).tolist() == [False] * 4 + [True, False]
        assert grads[2].isnan().flatten().tolist() == [False] * 4 + [True, False]


@pytest.mark.usefixtures("kernel")
def test_an_image_without_pixels_reads_none() -> None:
    config = replace(CONFIG, image=(0, 4), padding=(2, 1))
    (x, offset, mask), _ = make(config)
    dcnv3(x, torch.full_like(offset, torch.nan), mask, **config.options)


@pytest.mark.usefixtures("kernel")
def test_a_deterministic_gradient_hides_none() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            assert_only_theirs(CONFIG, dtype, torch.nan, True, True)
    finally:
        torch.use_deterministic_algorithms(False)


_OTHER_SETS = """
from tests.ops.dcnv3.test_not_finite import *
for dtype in DTYPES:
    for bad in BAD:
        for softmax in (False, True):
            assert_only_theirs(replace(CONFIG, softmax=softmax), dtype, bad, True, False)
for bad in BAD:
    test_a_mask_that_is_not_finite(OUTSIDE, bad, False)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_hide_none(capability: str) -> None:
    run_held_to(capability, _OTHER_SETS)
