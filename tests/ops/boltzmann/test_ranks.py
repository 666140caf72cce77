"""boltzmann on several gloo ranks is boltzmann in one process with all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.ops import SoftTargets, boltzmann
from m3i_fast.ops.boltzmann_exchange import Ring
from tests.ops.boltzmann.cases import FP32, FP64, KINDS, Case, make
from tests.ops.boltzmann.soft_cases import soft
from tests.shared.ranks import start_ranks

# Rows of each of four ranks: fewer ranks take the first; the last of a split takes what is left.
ROWS = {"equal": (12, 12, 12, 12), "unequal": (5, 20, 0, 11), "one has all": (0, 36, 0, 0)}
CASES = {
    **{kind: Case(kind, 48, 50 if kind.endswith("ids") or "classes" in kind else 48, 16)
       for kind in KINDS},
    "modality gap": Case("diagonal", 48, 48, 16, scale=100.0, gap=10.0),
    "very long rows": Case("classes", 48, 50, 16, scale=1.0, length=30.0),
}  # fmt: skip


def split(total: int, ranks: int, name: str) -> list[int]:
    shares = [min(share, total) for share in ROWS[name][: ranks - 1]]
    return [*shares, total - sum(shares)]


def call(rank: int, counts: tuple[list[int], list[int]], case: Case, dtype: torch.dtype,
         group: Any, **options: Any) -> dict[str, Tensor]:  # fmt: skip
    """What one rank gets."""
    whole = make(case, FP64)
    first = [sum(count[:rank]) for count in counts]
    rows, columns = (slice(f, f + count[rank]) for f, count in zip(first, counts, strict=True))
    mine = make(case, FP64)
    mine.tensors["z_hat"], mine.tensors["z"] = (
        whole.tensors["z_hat"][rows],
        whole.tensors["z"][columns],
    )
    for name, of in (("targets", rows), ("row_ids", rows), ("col_ids", columns)):
        if name in whole.options:
            mine.options[name] = whole.options[name][of]
    if "bias" in whole.tensors and whole.tensors["bias"].dim():
        mine.tensors["bias"] = whole.tensors["bias"][columns]
    return mine.run(boltzmann, dtype, process_group=group, **options)


def divides(case: Case, ranks: int) -> bool:
    return case.rows % ranks == case.columns % ranks == 0


def work(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    results = {}
    for name, case in CASES.items():
        for sizes in ROWS if ranks > 1 else ["equal"]:
            counts = split(case.rows, ranks, sizes), split(case.columns, ranks, sizes)
            for dtype in (FP32, FP64):
                results[name, sizes, dtype] = call(rank, counts, case, dtype, dist.group.WORLD)
        for sizes in () if divides(case, ranks) else ROWS:
            counts = split(case.rows, ranks, sizes), split(case.columns, ranks, sizes)
            told = list(zip(*counts, strict=True))
            results[name, f"{sizes}, told", FP64] = call(
                rank, counts, case, FP64, dist.group.WORLD, sizes=told
            )
        if divides(case, ranks):
            counts = [case.rows // ranks] * ranks, [case.columns // ranks] * ranks
            with patch.object(Ring, "is_settled", lambda *_: False):  # as on a GPU
                results[name, "not asked", FP32] = call(
                    rank, counts, case, FP32, dist.group.WORLD, equal_sizes=True
                )
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As data-parallel training sees it: gradients of parameters are means over the ranks."""
    ranks = len(parts)
    whole = {name: torch.cat([part[name] for part in parts]) / ranks for name in ("z_hat", "z")}
    whole["scale"] = sum(part["scale"] for part in parts) / ranks  # type: ignore[assignment]
    if "bias" in parts[0]:
        biases = [part["bias"] for part in parts]
        whole["bias"] = (
            torch.cat(biases) if biases[0].dim() else torch.stack(biases).sum()
        ) / ranks
    return whole


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(n, marks=pytest.mark.distributed) for n in (1, 3, 4))]
)
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    start_ranks(work, (ranks, tmp_path), ranks)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    num_asked = len(CASES) * (len(ROWS) if ranks > 1 else 1) * 2
    num_told = sum(1 if divides(case, ranks) else len(ROWS) for case in CASES.values())
    assert len(of_ranks[0]) == num_asked + num_told
    for key in of_ranks[0]:
        name, sizes, dtype = key
        expected = make(CASES[name], FP64).run(boltzmann, dtype)
        parts = [results[key] for results in of_ranks]
        tolerance = 1e-10 if dtype == FP64 else 1e-5
        for part in parts:
            torch.testing.assert_close(part["value"], expected["value"], rtol=tolerance, atol=1e-12)
        for tensor, grad in merged(parts).items():
            error = float((grad - expected[tensor]).norm() / expected[tensor].norm())
            assert error < tolerance, f"{name}, {sizes}, {dtype}, {tensor}: {error}"


def balance(rank: int, counts: list[int], folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), len(counts))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(counts))
    of = soft(sum(counts), 33).targets
    own = of.z_hat.split(counts)[rank]
    targets = SoftTargets.sinkhorn(own, of.z, of.scale, process_group=dist.group.WORLD)
    torch.save(targets.column_log_scale, folder / f"{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still reads has ended in gloo's SIGABRT
    dist.destroy_process_group()


@pytest.mark.distributed
def test_sinkhorn_of_ranks_is_that_of_all_rows(tmp_path: Path) -> None:
    """One of which has no rows."""
    counts = [0, 7, 23]
    start_ranks(balance, (counts, tmp_path), len(counts))
    of = soft(sum(counts), 33).targets
    expected = SoftTargets.sinkhorn(of.z_hat, of.z, of.scale).column_log_scale
    for rank in range(len(counts)):
        ours = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


class Gathers(TorchDispatchMode):
    """Counts gathers of integers over all ranks: of their sizes, which the host waits for."""

    num_integers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.num_integers += args[1].dtype == torch.int64
        return func(*args, **(kwargs or {}))


def count_gathers(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    rows, one = torch.randn(3, 4, requires_grad=True), torch.tensor(1.0)
    told = {"sizes": [(3, 3), (3, 3)]}
    for given, expected in (({}, 1), ({"equal_sizes": True}, 0), (told, 0)):
        for form in ("softmax", "sigmoid"):
            options: dict[str, Any] = {"form": form, **given}
            with Gathers() as gathers:
                boltzmann(rows, rows, one, process_group=dist.group.WORLD, **options).backward()
            assert gathers.num_integers == expected
    for wrong in ([(3, 3)], [(2, 3), (2, 3)]):
        with pytest.raises(ValueError, match=r"sizes: expected those of 2 ranks, \(3, 3\) of rank"):
            boltzmann(rows, rows, one, process_group=dist.group.WORLD, sizes=wrong)
    dist.barrier()  # a rank that leaves while the other still reads has ended in gloo's SIGABRT
    dist.destroy_process_group()


def test_known_sizes_are_not_asked_for(tmp_path: Path) -> None:
    start_ranks(count_gathers, (tmp_path,), 2)


def test_a_gpu_is_not_asked_which_sums_count() -> None:
    """A meta tensor has no value: it stands for a device that the host would have to wait for."""
    ring = Ring.__new__(Ring)
    assert not ring.is_settled(torch.empty((), dtype=torch.bool, device="meta"))
    assert ring.is_settled(torch.tensor(False)) and not ring.is_settled(torch.tensor(True))


def refuse(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    z_hat, z, one = torch.randn(3, 4), torch.randn(3 - rank, 4), torch.tensor(1.0)
    message = r"z: expected \[3, 3\] rows as z_hat \(by rank\)"
    with pytest.raises(ValueError, match=message):
        boltzmann(z_hat, z, one, process_group=dist.group.WORLD)
    for wrong in (5, 2**40, -5, 2**32 - 1):
        message = f"targets: expected rows of z from 0 to 4, .*got {wrong} in place 1"
        targets = torch.tensor([0, wrong, 1])
        with pytest.raises(RuntimeError, match=message):
            boltzmann(z_hat, z, one, targets=targets, process_group=dist.group.WORLD)
    dist.destroy_process_group()


def test_all_ranks_refuse_what_one_has_wrong(tmp_path: Path) -> None:
    start_ranks(refuse, (tmp_path,), 2)
