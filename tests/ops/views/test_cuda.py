"""The CUDA kernel of views has the bits of the CPU's: emulated here, and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.ops.views import VIEW_PARAMS, ViewSpec, make_views, view_specs
from tests.shared.cuda.emulator import emulated, logged_launches
from tests.shared.ops.views_cases import CASES, Case, group, make, row

Views = tuple[Tensor, ...]


def expect_equal(got: Views, expected: Views, params: Tensor) -> None:
    """Hold every view of every sample, each by name."""
    for v, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours.shape == theirs.shape and ours.is_contiguous()
        for sample in range(len(ours)):
            different = (ours[sample] != theirs[sample]).sum().item()
            told = dict(zip(VIEW_PARAMS, params[sample, v].tolist(), strict=True))
            assert different == 0, f"view {v} of sample {sample}: {different} values, {told}"


def both(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], specs: tuple[ViewSpec, ...]
) -> tuple[Views, Views]:
    """Return the views by the emulated CUDA kernel and by the CPU's."""
    with emulated("views"):
        on_cuda = make_views(*inputs, views=specs)
    return on_cuda, make_views(*inputs, views=specs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_emulated_cuda_gives_the_bits_of_the_cpu(case: Case) -> None:
    inputs = make(case)
    expect_equal(*both(inputs, case.specs), inputs[-1])


def orders() -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[ViewSpec, ...]]:
    """Return a call with the 24 orders of the colour steps, every second one flipped."""
    rows = [
        row(
            height=11, width=13, brightness=1.3, contrast=0.6, saturation=1.4, hue=-0.2,
            order=order, flip=order % 2, gray=float(order % 5 == 4), solarize=float(order % 3 == 0),
            sigma=1.1 * (order % 4 == 0),
        )
        for order in range(24)
    ]  # fmt: skip
    pixels, offset, image_size, _ = make(Case(pictures=[[(11, 13)]], groups=[group(9)]))
    return (pixels, offset, image_size, torch.stack(rows)[None]), view_specs(group(9, 24))


def test_colours_in_every_order_have_the_bits_of_the_cpu() -> None:
    inputs, specs = orders()
    on_cuda, on_cpu = both(inputs, specs)
    expect_equal(on_cuda, on_cpu, inputs[-1])
    assert len({view.numpy().tobytes() for view in on_cpu}) == 24


@pytest.mark.parametrize(
    "changes", [{}, {"brightness": 0.3}, {"contrast": 1.7}, {"saturation": 0.0}, {"hue": 0.4},
                {"gray": 1.0}, {"solarize": 1.0}, {"sigma": 0.7}, {"sigma": 30.0}, {"flip": 1.0}],
    ids=lambda changes: next(iter(changes), "nothing"),
)  # fmt: skip
def test_each_step_alone_has_the_bits_of_the_cpu(changes: dict[str, float]) -> None:
    case = Case(pictures=[[(21, 17)]], groups=[group(15), group(16, interpolation="linear")])
    one = row(y=2, x=1, height=18, width=15, **changes)
    inputs = (*make(case)[:3], torch.stack([one, one])[None])
    expect_equal(*both(inputs, case.specs), inputs[-1])


@pytest.mark.parametrize("shift", [1, 7])
def test_pictures_at_any_address(shift: int) -> None:
    """Rows are loaded in pieces of 16 bytes, but for what precedes and follows them."""
    case = CASES["two sizes, every step"]
    pixels, offset, image_size, params = make(case, shift)
    moved = torch.empty(len(pixels) + 3, dtype=torch.uint8)[3:].copy_(pixels)
    expect_equal(*both((moved, offset, image_size, params), case.specs), params)


def test_one_launch_makes_all_views(tmp_path: Path) -> None:
    case = CASES["two sizes, every step"]
    with emulated("views"), logged_launches(tmp_path / "launches.jsonl"):
        make_views(*make(case), views=case.specs)
    (launch,) = map(json.loads, (tmp_path / "launches.jsonl").read_text().splitlines())
    assert launch["name"].startswith("void m3i::views::views_kernel<256>(")
    assert launch["grid"] == [15, 1, 1] and launch["block"] == [256, 1, 1]  # 5 views, 3 samples
    assert launch["shared"] == 38 * 1024


WRONG = {
    "a crop past its picture": {"height": 12.0},
    "a crop before its picture": {"y": -1.0},
    "an empty crop": {"width": 0.0},
    "not a number": {"x": float("nan"), "width": float("nan")},
    "no such order": {"order": 24.0},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_parameters_that_leave_the_picture_stop_the_kernel(changes: dict[str, float]) -> None:
    case = Case(pictures=[[(11, 13)]], groups=[group(9)])
    params = row(**{"height": 11.0, "width": 13.0, **changes})[None, None]
    with emulated("views"), pytest.raises(RuntimeError, match=r"__trap\(\)\n  kernel .*views_ker"):
        make_views(*make(case)[:3], params, views=case.specs)


def test_a_picture_past_the_pixels_stops_the_kernel() -> None:
    case = CASES["plain"]
    pixels, *others = make(case)
    with emulated("views"), pytest.raises(RuntimeError, match=r"__trap\(\)\n  kernel .*views_ker"):
        make_views(pixels[:-1], *others, views=case.specs)


def test_a_crop_of_a_thousand_times_the_view_stops_the_kernel() -> None:
    case = Case(pictures=[[(1, 9000)]], groups=[group(3, scale=(1.0, 1.0), ratio=(1000.0, 1000.0))])
    one = row(height=1, width=9000)[None, None]
    with emulated("views"), pytest.raises(RuntimeError, match=r"__trap\(\)\n  kernel .*views_ker"):
        make_views(*make(case)[:3], one, views=case.specs)


def test_too_many_views_are_refused() -> None:
    case = Case(pictures=[[(4, 4)]], groups=[group(2, 64), group(2, 64), group(3)])
    with emulated("views"), pytest.raises(RuntimeError, match=r"up to 128 views .*, got 129"):
        make_views(*make(case), views=case.specs)


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cuda_gives_the_bits_of_the_cpu(case: Case) -> None:
    inputs = make(case)
    on_cuda = make_views(*(tensor.cuda() for tensor in inputs), views=case.specs)
    expect_equal(
        tuple(view.cpu() for view in on_cuda), make_views(*inputs, views=case.specs), inputs[-1]
    )


@pytest.mark.gpu
def test_cuda_has_the_bits_of_the_cpu_in_every_order_and_at_full_size() -> None:
    large = Case(
        pictures=[[(375, 500)], [(1024, 768)], [(333, 499)], [(3000, 4000)]],
        groups=[group(224, 2), group(96, 8)],
    )
    for inputs, specs in (orders(), (make(large), large.specs)):
        on_cuda = make_views(*(tensor.cuda() for tensor in inputs), views=specs)
        expect_equal(
            tuple(view.cpu() for view in on_cuda), make_views(*inputs, views=specs), inputs[-1]
        )


@pytest.mark.gpu
def test_a_call_waits_for_nothing() -> None:
    case = CASES["blurred out of scratch memory"]
    inputs = [tensor.cuda() for tensor in make(case)]
    make_views(*inputs, views=case.specs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_views(*inputs, views=case.specs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
