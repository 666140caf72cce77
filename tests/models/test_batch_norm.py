"""BatchNorm of one rank and of several gloo ranks against torch's BatchNorm1d on all rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.models.batch_norm import BatchNorm
from tests.shared.ranks import start_ranks

C = 5
ROWS = {2: (3, 9), 3: (4, 0, 8)}  # unequal, and a rank without any
STEPS = 2
DTYPES = (torch.float64, torch.float32)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

Result = dict[str, Tensor]


def batches(dtype: torch.dtype) -> list[Tensor]:  # STEPS x [12, 2, C], far from zero
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, sum(ROWS[2]), 2, C, generator=rng, dtype=torch.float64)
    return list((x * torch.arange(1.0, C + 1) + 50).to(dtype))


def train(norm: nn.BatchNorm1d, rows: slice, dtype: torch.dtype) -> Result:
    """Two steps and an evaluation; the loss of a row does not depend on who holds it."""
    norm.to(dtype)
    with torch.no_grad():
        for parameter, start in ((norm.weight, 0.5), (norm.bias, -1.0)):
            parameter.copy_(torch.linspace(start, start + 1, C))
    result: Result = {}
    for step, batch in enumerate(batches(dtype)):
        x = batch[rows].requires_grad_()
        out = norm(x.flatten(0, 1)).view_as(x) if type(norm) is nn.BatchNorm1d else norm(x)
        towards = torch.linspace(-1, 1, batch.numel(), dtype=dtype).view_as(batch)[rows]
        (out * towards + out**3).sum().backward()
        assert x.grad is not None
        result |= {f"out {step}": out.detach(), f"gradient {step}": x.grad}
    result |= {f"{name}.grad": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    result |= norm.state_dict()
    norm.eval()
    result["evaluated"] = norm(batches(dtype)[0][:, 0]).detach()
    return result


def work(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    first = sum(ROWS[ranks][:rank])
    rows = slice(first, first + ROWS[ranks][rank])
    results = {
        str(dtype): train(BatchNorm(C, process_group=dist.group.WORLD), rows, dtype)
        for dtype in DTYPES
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def check(parts: list[Result], dtype: torch.dtype) -> None:
    """What all ranks got, against BatchNorm1d of all rows in float64."""
    for name, truth in train(nn.BatchNorm1d(C), slice(None), torch.float64).items():
        if name.startswith(("out", "gradient")):
            got = [torch.cat([part[name] for part in parts])]
        elif name.endswith(".grad"):  # a rank's part of the sum
            got = [torch.stack([part[name] for part in parts]).sum(0)]
        else:
            got = [part[name] for part in parts]
        for value in got:
            difference = float((value.double() - truth.double()).norm() / truth.double().norm())
            assert difference < TOLERANCE[dtype], f"{name}, {dtype}: {difference}"


@pytest.mark.parametrize("ranks", ROWS)
def test_ranks_equal_the_whole_batch_in_one(ranks: int, tmp_path: Path) -> None:
    start_ranks(work, (ranks, tmp_path), ranks)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for dtype in DTYPES:
        check([results[str(dtype)] for results in of_ranks], dtype)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_of_one_is_batch_norm(dtype: torch.dtype, alone: dist.ProcessGroup) -> None:
    check([train(BatchNorm(C, process_group=alone), slice(None), dtype)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_group_it_is_batch_norm(dtype: torch.dtype) -> None:
    got, expected = (train(norm, slice(None), dtype) for norm in (BatchNorm(C), nn.BatchNorm1d(C)))
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), name


def test_gradcheck(alone: dist.ProcessGroup) -> None:
    norm = BatchNorm(C, process_group=alone).double()
    x = torch.randn(6, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


def test_halves_have_statistics_in_fp32(alone: dist.ProcessGroup) -> None:
    x = (torch.randn(64, C) + 30).bfloat16()
    out = BatchNorm(C, process_group=alone)(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, BatchNorm(C, process_group=alone)(x.float()).bfloat16())


def test_variance_survives_a_mean_far_from_zero(alone: dist.ProcessGroup) -> None:
    x = torch.randn(64, C) + 3000
    truth = (x.double() - x.double().mean(0)) / (x.double().var(0, correction=0) + 1e-5).sqrt()
    got = BatchNorm(C, process_group=alone)(x)
    torch.testing.assert_close(got.double(), truth, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", [(3, 4), (5,)])
def test_wrong_shapes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"input: expected \[N, \.\.\., 5\], got"):
        BatchNorm(C)(torch.randn(shape))
