"""Descriptions of our kernels: their requests are exactly those that the emulator counts."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast import ops
from m3i_fast.costs.kernels import boltzmann, dcnv3, elementwise, instructions
from m3i_fast.costs.kernels.constants import rates_of
from m3i_fast.costs.kernels.gather import Sampling
from m3i_fast.costs.kernels.model import SECTOR, predict
from m3i_fast.ops import tiles
from tests.shared.cuda.emulator import emulated
from tests.shared.cuda.requests import LineRequests, counted_requests, read_requests

Counted = dict[str, list[LineRequests]]


def waves(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Values in [-scale, scale] that look like nothing in particular."""
    count = torch.Size(shape).numel()
    return (scale * (torch.arange(count) * 0.7).sin()).to(dtype).view(shape)


def count(op: str, call: Callable[[], object], folder: Path, architecture: int = 80) -> Counted:
    """Return what each kernel of the call asked for under the emulator, by its short name."""
    file = folder / "requests.jsonl"
    with emulated(op, architecture=architecture), counted_requests(file):
        call()
    found: defaultdict[str, list[LineRequests]] = defaultdict(list)
    for row in read_requests(file):
        found[re.sub(r"m3i::(\w+::)?|<.*", "", row.kernel)].append(row)
    return dict(found)


def units(rows: list[LineRequests], memory: str, access: str, text: str = "") -> int:
    """Return the units of one kind, of the lines with that text."""
    kinds = [row for row in rows if (row.memory, row.access) == (memory, access)]
    return sum(row.units for row in kinds if text in row.source)


# ---- dcnv3 ---------------------------------------------------------------------------------------


def inside_offsets(s: Sampling) -> Tensor:
    """Whole pixels that bring all corners of all points inside, a strip of 8 columns together."""
    row, column = torch.arange(s.height)[:, None, None], torch.arange(s.width)[None, :, None]
    step_x, step_y = torch.arange(9) // 3 - 1, torch.arange(9) % 3 - 1
    x, y = column // 8 * 8 + step_x, row + step_y
    by_x = x.clamp(0, s.width - 9) - x + 0 * row
    by_y = y.clamp(0, s.height - 2) - y + 0 * column
    of_group = torch.stack([by_x, by_y], -1).reshape(1, s.height, s.width, 1, 18)
    return of_group.expand(s.batch, -1, -1, s.groups, -1).reshape(s.batch, s.height, s.width, -1)


def dcnv3_call(s: Sampling, dtype: torch.dtype, offset: Tensor) -> Callable[[], None]:
    def run() -> None:
        x = waves(s.batch, s.height, s.width, s.channels, dtype=dtype).requires_grad_()
        mask = torch.zeros(s.batch, s.height, s.width, s.groups * 9, dtype=dtype)
        own = offset.to(dtype).requires_grad_()
        geometry = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
        out = ops.dcnv3(x, own, mask.requires_grad_(), groups=s.groups, **geometry)
        assert out.shape[1:3] == (s.height, s.width)
        out.backward(waves(*out.shape, dtype=dtype))

    return run


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 8, 16, 32, 2), torch.bfloat16),
        ((2, 4, 16, 64, 4), torch.bfloat16),
        ((1, 8, 16, 64, 2), torch.bfloat16),
        ((1, 8, 16, 32, 2), torch.float32),
    ],
)
def test_requests_of_dcnv3_are_those_counted(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    batch, height, width, channels, groups = shape
    s = Sampling(
        batch=batch, height=height, width=width, channels=channels, groups=groups,
        size=dtype.itemsize, reach=0.0,
    )  # fmt: skip
    counted = count("dcnv3", dcnv3_call(s, dtype, inside_offsets(s)), tmp_path)
    layout = dcnv3.layout_of(s, "a100")
    for name, backward in (("dcnv3_nine_kernel", False), ("dcnv3_bwd_window_kernel", True)):
        rows, asked = counted[name], layout.requests(backward=backward)
        found = [units(rows, "global", access) for access in ("read", "write")]
        if backward and layout.slices > 1:  # points of a slice lie apart: 10 % more of them
            assert found[0] - asked.gathered == pytest.approx(asked.read, rel=0.1)
            assert found[1] == pytest.approx(asked.written, rel=0.1)
        else:
            assert found == [asked.gathered + asked.read, asked.written]
        assert units(rows, "global", "atomic") == asked.added
        shared = units(rows, "shared", "read") + units(rows, "shared", "write")
        assert shared == asked.shared


def test_groups_that_the_description_does_not_know_are_refused() -> None:
    s = Sampling(batch=1, height=8, width=8, channels=64, groups=1, size=2, reach=0.0)
    with pytest.raises(ValueError, match="groups of 16 or 32 channels, got 3 x 3 and 64"):
        dcnv3.forward(s, rates_of("a100"))


def test_points_that_leave_their_window_are_as_many_as_counted(tmp_path: Path) -> None:
    """Which depends on the offsets: evenly spread ones within 5 %, normal ones within a third.

    What windows add, once a row, is exact whatever the offsets.
    """
    s = Sampling(batch=1, height=24, width=24, channels=32, groups=2, size=2, reach=3**0.5 * 1.5)
    layout, corners = dcnv3.layout_of(s, "a100"), s.corners()
    asked = layout.requests(backward=True, corners=corners)
    shape, rng = (1, 24, 24, 36), torch.Generator().manual_seed(0)
    even = (2 * torch.rand(shape, generator=rng) - 1) * s.reach
    for offset, bound in ((even, 0.05), (1.5 * torch.randn(shape, generator=rng), 0.34)):
        rows = count("dcnv3", dcnv3_call(s, torch.bfloat16, offset), tmp_path)
        rows = rows["dcnv3_bwd_window_kernel"]
        assert units(rows, "global", "atomic", "in_image") == layout.flushed_sectors()
        outside = units(rows, "global", "atomic", "red_add(to, values)")
        assert outside == pytest.approx(asked.added - layout.flushed_sectors(), rel=bound)
        (tmp_path / "requests.jsonl").unlink()


def test_rows_of_windows_are_added_in_whole_sectors() -> None:
    """On both cards as many: an A100's single floats are those of 32 neighbouring lanes."""
    s = Sampling(batch=64, height=56, width=56, channels=128, groups=8, size=2, reach=2.6)
    added = [dcnv3.backward(s, rates_of(card))[1].atomic_sectors for card in ("a100", "h100")]
    assert added[0] == added[1] < 2 * s.corners() / 7  # a corner alone is two sectors


# ---- boltzmann -----------------------------------------------------------------------------------


def boltzmann_call(call: boltzmann.Call) -> Callable[[], None]:
    def run() -> None:
        z_hat, z = (
            waves(n, call.dim, dtype=torch.bfloat16, scale=s).requires_grad_()
            for n, s in ((call.rows, 0.1), (call.columns, 0.2))
        )
        ops.boltzmann(z_hat, z, torch.tensor(8.0, requires_grad=True)).backward()

    return run


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize(("card", "architecture", "side"), [("h100", 90, 256), ("a100", 80, 256)])
def test_requests_of_boltzmann_are_those_counted(
    card: str, architecture: int, side: int, dim: int, tmp_path: Path
) -> None:
    call = boltzmann.Call(rows=side, columns=side, dim=dim)
    counted = count("boltzmann", boltzmann_call(call), tmp_path, architecture)
    rates, own = rates_of(card), boltzmann.tiles_of(card)
    copies = "tma_load" if card == "h100" else "copy_async"
    copied = boltzmann.copy_sectors(own, call.rows, call.columns, call.dim)
    rows = counted[boltzmann._kernel("sums", own)]
    assert units(rows, "global", "read", copies) == copied
    added, written = boltzmann.sum_sectors(call, own)
    # The emulator stores a pair of columns' positives as two numbers, each in all of its sectors.
    pairs = 3 * 4 * side * 4 / SECTOR if own.is_hopper else 0
    assert units(rows, "global", "write") == written + pairs
    assert added == 0  # a patch is a tile
    rows = counted[boltzmann._kernel("grads" if own.is_hopper else "logit_grads", own)]
    grads = sum(phase.write_sectors for phase in boltzmann.logit_grads(call, rates))
    features = copied_features = 0.0
    if own.is_hopper:  # in the same launch
        features = sum(phase.write_sectors for phase in boltzmann.feature_grads(call, rates))
        product, *_ = boltzmann.feature_grads(call, rates)
        copied_features = product.read_sectors
    # One number a half for the scale, and where clusters count what is done.
    scale_grads = side * side / own.half_rows / own.columns
    found = units(rows, "global", "write")
    assert grads + features <= found <= grads + 2 * features + 2 * scale_grads  # pairs, as above
    if not own.is_hopper or dim % own.columns == 0:
        assert units(rows, "global", "read", copies) == copied + copied_features
    if not own.is_hopper:
        rows, steps = counted["boltzmann_sums_kernel"], 4 * dim / own.depth  # of four blocks
        found = units(rows, "shared", "read", "load_matrices")
        found += units(rows, "shared", "write", "copy_async")
        assert found == steps * boltzmann.step_wavefronts(own)
    if (
        not own.is_hopper and dim % own.columns == 0
    ):  # of narrower features a copy asks for no more than there are
        rows = counted[boltzmann._kernel("feature_grads", own)]
        product, *_ = boltzmann.feature_grads(call, rates)
        grads = 4 * 2 * side * dim / SECTOR
        added = 0 if own.is_hopper else grads  # beside the products, where they overlap
        assert units(rows, "global", "read", copies) == product.read_sectors - added
        assert units(rows, "global", "write") == grads


def test_sums_of_patches_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One patch of 4 x 4 tiles, whose sums of a kind are 64 sectors by row and 64 by column.

    Of negatives each tile adds a quarter of either; of three other kinds only the first ones write.
    """
    monkeypatch.setattr(boltzmann, "MANY_PATCHES", 1)
    call = boltzmann.Call(rows=512, columns=512, dim=64)
    added, written = boltzmann.sum_sectors(call, boltzmann.tiles_of("a100"))
    assert written == 4 * (64 + 64) + 3 * (64 + 64)
    assert added == 3 * (64 + 64)


@pytest.mark.parametrize("size", [4096, 32768])
@pytest.mark.parametrize("card", ["h100", "a100"])
def test_sums_are_one_launch(card: str, size: int) -> None:
    call = boltzmann.Call(rows=size, columns=size, dim=64)
    phases = (*boltzmann.sums(call, rates_of(card)), *boltzmann.logit_grads(call, rates_of(card)),
              *boltzmann.feature_grads(call, rates_of(card)))  # fmt: skip
    launches = sum(phase.times for phase in phases if phase.starts)
    own = boltzmann.tiles_of(card)
    blocks = boltzmann.make_blocks(call, own, own.grads_bytes // own.size).count
    # As tests/cuda/boltzmann/test_launches.py and tests/ops/boltzmann/test_launches.py count them.
    assert launches == (8 + 7 if card == "h100" else 6 + 7 + 3 * blocks)


def test_rows_alone_are_three_products() -> None:
    call = boltzmann.Call(rows=16384, columns=21841, dim=1024, symmetric=False)
    rates = rates_of("h100")
    for backward, products in ((False, 1), (True, 3)):
        phases = boltzmann.rows_alone(call, rates, backward=backward)
        flop = sum(phase.tensor_flop * phase.times for phase in phases)
        assert flop == pytest.approx(products * 2 * 16384 * 21841 * 1024, rel=1e-3)
        moved = sum(phase.memory_bytes * phase.times for phase in phases)
        logits = 4 * 16384 * 21841
        assert moved > (2 + 2 * backward) * logits  # written and read; G written, read twice


def test_products_of_a_call_are_eight_n_m_d() -> None:
    call = boltzmann.Call(rows=32768, columns=32768, dim=512)
    for card in ("a100", "h100"):
        phases = [
            phase
            for of in (boltzmann.sums, boltzmann.logit_grads, boltzmann.feature_grads)
            for phase in of(call, rates_of(card))
        ]
        flop = sum(phase.tensor_flop * phase.times for phase in phases)
        assert flop == pytest.approx(8 * 32768**2 * 512, rel=0.06)  # tiles at the edges are whole


# ---- The others ----------------------------------------------------------------------------------


def test_requests_of_gaussian_are_those_counted(tmp_path: Path) -> None:
    rows, width = 64, 256

    def run() -> None:
        z_hat = waves(rows, width, dtype=torch.bfloat16).requires_grad_()
        target = waves(rows, width, dtype=torch.bfloat16, scale=2.0)
        ops.gaussian(z_hat, target, normalise=True).backward()

    counted = count("gaussian", run, tmp_path)
    for name, backward in (("gaussian_kernel", False), ("gaussian_bwd_kernel", True)):
        read, written = elementwise.gaussian_sectors(rows, width, backward=backward)
        assert units(counted[name], "global", "read") == read
        assert units(counted[name], "global", "write") == written


def test_pixels_of_mask_mix_are_those_counted(tmp_path: Path) -> None:
    def run() -> None:
        views = (waves(4, 3, 64, 64, dtype=torch.float32, scale=127) + 128).to(torch.uint8)
        choice = (torch.arange(2 * 4 * 4) % 2).to(torch.uint8).view(2, 4, 4)
        ops.mask_mix(views, choice, torch.arange(4).view(2, 2), dtype=torch.bfloat16)

    rows = count("mask_mix", run, tmp_path)["mask_mix_kernel"]
    read, written = elementwise.mask_mix_sectors(2, 64, 16)
    assert units(rows, "global", "read", "load<kPixels>") == read
    assert units(rows, "global", "write") == written


# ---- Instructions --------------------------------------------------------------------------------


def test_instructions_scale_the_issue_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with other counts, as of a changed kernel, takes the place of the present one."""
    s = Sampling(batch=64, height=56, width=56, channels=128, groups=8, size=2, reach=2.6)
    rates = rates_of("h100")
    present = predict(dcnv3.forward(s, rates), rates)
    counts = instructions.instructions_of("dcnv3", "dcnv3_nine_kernel")
    halves = {unit: count / 2 for unit, count in counts.items()}
    (tmp_path / "dcnv3").mkdir()
    content = {"origin": "a test", "kernels": {"dcnv3_nine_kernel": halves}}
    (tmp_path / "dcnv3" / instructions.FILE).write_text(json.dumps(content))
    monkeypatch.setattr(instructions, "CUDA", tmp_path)
    halved = predict(dcnv3.forward(s, rates), rates)
    assert halved.columns["issue"] == pytest.approx(present.columns["issue"] / 2)
    assert instructions.read_instructions("dcnv3")[0] == "a test"
    with pytest.raises(ValueError, match="expected dcnv3_bwd_window_kernel in kernels"):
        dcnv3.backward(s, rates)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kernels": {}}, "expected an object with origin and kernels"),
        ({"origin": "", "kernels": {"k": {"warp": 0}}}, r"k\.warp: expected a number > 0, got 0"),
    ],
)
def test_wrong_instructions_are_refused(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "CUDA", tmp_path)
    with pytest.raises(ValueError, match=r"cuda/dcnv3/instructions\.json: expected in a checkout"):
        instructions.read_instructions("dcnv3")
    (tmp_path / "dcnv3").mkdir()
    (tmp_path / "dcnv3" / instructions.FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        instructions.read_instructions("dcnv3")


def test_every_kernel_with_instructions_is_one_of_the_budget() -> None:
    for path in tiles.CUDA.glob("*/instructions.json"):
        budget = json.loads((path.parent / "budget.json").read_text())
        known = {name.partition("<")[0] for kernels in budget.values() for name in kernels}
        assert instructions.read_instructions(path.parent.name)[1].keys() <= known
