"""The CUDA kernel of patches has the bits of the CPU's rectangles: emulated here, and on a GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.ops.views import ViewSpec, cut_patches, make_patches, make_views
from tests.shared.cuda.emulator import emulated, logged_launches
from tests.shared.ops.views_cases import CASES, Case, group, make, row

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A call of views, and what its grids of patches are drawn from."""

    of: Case
    patch_size: int
    most: int
    """Rows and columns of patches."""

    def grids(self) -> Tensor:
        shape = len(self.of.pictures), len(self.of.specs), 2
        rng = torch.Generator().manual_seed(self.patch_size)
        return torch.randint(1, self.most + 1, shape, generator=rng)


STEPS = CASES["two sizes, every step"]
CUTS = {
    "patches of 4": Cut(of=STEPS, patch_size=4, most=9),
    # Whose pixels are not read by fours.
    "patches of 5": Cut(of=STEPS, patch_size=5, most=6),
    "patches of a pixel": Cut(of=STEPS, patch_size=1, most=20),
    "patches of 16": Cut(of=CASES["odd pictures"], patch_size=16, most=3),
    "crops too tall for all weights": Cut(
        of=CASES["crops too tall for all weights"], patch_size=4, most=2
    ),
    "two pictures a sample": Cut(of=CASES["two pictures a sample"], patch_size=7, most=4),
    # Cut short where a view has fewer pixels; in several runs of columns where it is wide.
    "a long blur": Cut(
        of=Case(
            pictures=[[(30, 41)], [(22, 17)], [(60, 9)]],
            groups=[group(90, blur_probability=1.0, blur_kernel_size=179, blur_sigma=(9.0, 30.0))],
        ),
        patch_size=8,
        most=16,
    ),
    "no samples": Cut(of=CASES["no samples"], patch_size=4, most=3),
}


def expect_equal(inputs: Inputs, grids: Tensor, specs: tuple[ViewSpec, ...], patch: int) -> None:
    """Hold each patch of the emulated kernel to the CPU's."""
    with emulated("views"):
        on_cuda = make_patches(*inputs, grids, views=specs, patch_size=patch)
    on_cpu = make_patches(*inputs, grids, views=specs, patch_size=patch)
    for v, (ours, theirs) in enumerate(zip(on_cuda, on_cpu, strict=True)):
        assert ours.shape == theirs.shape and ours.is_contiguous()
        different = (ours != theirs).any(1).nonzero().flatten().tolist()
        assert not different, f"view {v}: patches {different} of grids {grids[:, v].tolist()}"


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_emulated_cuda_gives_the_bits_of_the_cpu(cut: Cut) -> None:
    expect_equal(make(cut.of), cut.grids(), cut.of.specs, cut.patch_size)


@pytest.mark.parametrize("changes", [{}, {"contrast": 1.7}, {"sigma": 0.7}, {"flip": 1.0}])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (5, 8)])
def test_each_step_of_each_shape(grid: tuple[int, int], changes: dict[str, float]) -> None:
    case = Case(pictures=[[(21, 37)]], groups=[group(15), group(16, interpolation="linear")])
    one = row(y=2, x=1, height=18, width=30, **changes)
    inputs = (*make(case)[:3], torch.stack([one, one])[None])
    expect_equal(inputs, torch.tensor([[grid, grid[::-1]]]), case.specs, 4)


def test_a_crop_of_thousands_of_times_the_view() -> None:
    """Shared memory has not room for the weights of one column, or of one row."""
    for height, width in ((1, 9000), (9000, 1)):
        case = Case(pictures=[[(height, width)]], groups=[group(3), group(2)])
        one = row(height=height, width=width, brightness=1.1, contrast=1.4, order=1, flip=1)
        inputs = (*make(case)[:3], torch.stack([one, one])[None])
        expect_equal(inputs, torch.tensor([[(2, 1), (1, 3)]]), case.specs, 2)


def test_squares_are_those_of_the_squares_kernel() -> None:
    inputs = make(STEPS)
    grids = torch.tensor([[of.size // 4] * 2 for of in STEPS.specs]).expand(3, -1, -1)
    with emulated("views"):
        made = make_patches(*inputs, grids, views=STEPS.specs, patch_size=4)
        squares = make_views(*inputs, views=STEPS.specs)
    for patches, views in zip(made, squares, strict=True):
        assert torch.equal(patches, cut_patches(views, 4).flatten(0, 1))


def test_one_launch_makes_all_views(tmp_path: Path) -> None:
    cut = CUTS["patches of 4"]
    with emulated("views"), logged_launches(tmp_path / "launches.jsonl"):
        make_patches(*make(cut.of), cut.grids(), views=cut.of.specs, patch_size=4)
    (launch,) = map(json.loads, (tmp_path / "launches.jsonl").read_text().splitlines())
    assert launch["name"].startswith("void m3i::views::views_patches_kernel<256>(")
    assert launch["grid"] == [15, 1, 1] and launch["block"] == [256, 1, 1]  # 5 views, 3 samples
    assert launch["shared"] == 38 * 1024


WRONG = {
    "no rows": (0, 2, 0),
    "past the room": (2, 2, 1),
    "before it": (1, 2, -1),
    "long": (1, 9, 0),
}


@pytest.mark.parametrize("grid", WRONG.values(), ids=WRONG.keys())
def test_grids_without_room_stop_the_kernel(grid: tuple[int, int, int]) -> None:
    """The public function checks them on the host; the operator has them on the device."""
    case = CASES["plain"]
    arguments = (*make(case), torch.tensor([[grid]]), [1, 1], 4, [4], 1)
    with (
        emulated("views"),
        pytest.raises(RuntimeError, match=r"__trap\(\)\n  kernel .*views_patches_k"),
    ):
        torch.ops.m3i.make_patches(*arguments)
    with pytest.raises(RuntimeError, match=r"grids\[0, 0\]: expected 1 to 4096 rows|4 of the view"):
        torch.ops.m3i.make_patches(*arguments)


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_cuda_gives_the_bits_of_the_cpu(cut: Cut) -> None:
    inputs, options = make(cut.of), {"views": cut.of.specs, "patch_size": cut.patch_size}
    on_cuda = make_patches(*(tensor.cuda() for tensor in inputs), cut.grids(), **options)
    on_cpu = make_patches(*inputs, cut.grids(), **options)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_cuda, on_cpu, strict=True))


@pytest.mark.gpu
def test_a_call_waits_for_nothing() -> None:
    cut = CUTS["patches of 16"]
    inputs = [tensor.cuda() for tensor in make(cut.of)]
    make_patches(*inputs, cut.grids(), views=cut.of.specs, patch_size=16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_patches(*inputs, cut.grids(), views=cut.of.specs, patch_size=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
