"""Muon against fp64 loops and torch's, on matrices together, in fp32 on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.optim import muon, skippable_step
from m3i_fast.engine.optim.muon import Muon, orthogonalise
from m3i_fast.engine.optim.optimizers import build_optimizer
from m3i_fast.models.transformer.vit import ViT
from tests.shared.engine import optimiser_runs as runs

CONFIG = OptimConfig(lr=0.01, weight_decay=0.1, matrices="muon", layer_decay=0.5)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_STEPS = 5
SHAPES = [(48, 16), (16, 16), (64, 16), (16, 64), (1, 7), (5, 3)]


def drawn(kind: str, rows: int, columns: int) -> Tensor:
    """A matrix of any rank: full, low, of zeros, of singular values over six decades, huge."""
    rng = torch.Generator().manual_seed(rows * 100 + columns)
    full = torch.randn(rows, columns, generator=rng)
    return {
        "full": lambda: full,
        "low": lambda: full[:, :1] @ full[:1],
        "zeros": lambda: torch.zeros_like(full),
        "decades": lambda: full * torch.logspace(0, -6, columns),
        "huge": lambda: full * 1e15,
        "tiny": lambda: full * 1e-12,
    }[kind]()


class Products(TorchDispatchMode):
    """Note every product of matrices: how its dtype is called, and the elements of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "matmul"):
            self.seen.append((result.dtype, result.numel()))
        return result


def with_gradients(*shapes: tuple[int, int]) -> list[Tensor]:
    parameters: list[Tensor] = []
    for index, shape in enumerate(shapes):
        rng = torch.Generator().manual_seed(index)
        parameters.append(nn.Parameter(torch.randn(shape, generator=rng)))
        parameters[-1].grad = torch.randn(shape, generator=rng)
    return parameters


@pytest.mark.parametrize("kind", ["full", "low", "zeros", "decades", "huge", "tiny"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_directions_are_those_of_an_fp64_loop(kind: str, rows: int, columns: int) -> None:
    matrices = torch.stack([drawn(kind, rows, columns), drawn("full", rows, columns)])
    got = orthogonalise(matrices, COEFFICIENTS, NUM_STEPS, eps=1e-7)
    for one, matrix in zip(got, matrices, strict=True):
        torch.testing.assert_close(
            one.double(), runs.orthogonal(matrix.double()), rtol=0.0, atol=1e-3
        )


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_bf16_is_torchs_but_for_roundings(rows: int, columns: int) -> None:
    """A thousandth of the values may round the other way: a batch's norm is summed in parts."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    matrices = torch.stack([drawn("full", rows, columns)] * 3).bfloat16()
    got = orthogonalise(matrices, COEFFICIENTS, NUM_STEPS, eps=1e-7)
    expected = _zeropower_via_newtonschulz(matrices[0], COEFFICIENTS, NUM_STEPS, 1e-7)
    assert got.dtype == torch.bfloat16
    for one in got:
        error = (one.float() - expected.float()).norm() / expected.float().norm()
        assert float(error) < 2e-3


def test_steps_are_those_of_an_fp64_loop() -> None:
    """Learning rates of layers, schedules, a missing gradient's matrix and one of zeros."""
    model, start = runs.small_vit(), runs.small_vit()
    runs.run(CONFIG, model)
    expected = runs.loop(runs.adamw, CONFIG, start)
    steps = runs.loop(runs.muon, CONFIG, start)
    matrices = [n for n, p in start.named_parameters() if "blocks." in n and p.ndim == 2]
    assert len(matrices) == 8
    runs.assert_same_change(model, expected | {name: steps[name] for name in matrices}, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_torchs_within_bf16(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "matmul_dtype", lambda device: dtype)
    shapes = SHAPES * 2
    ours, theirs, start = (with_gradients(*shapes) for _ in range(3))
    optimizers = [Muon(ours, lr=0.1, weight_decay=0.3), torch.optim.Muon(theirs, 0.1, 0.3)]
    assert optimizers[0].param_groups[0].keys() == optimizers[1].param_groups[0].keys()
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    bound = 0.05 if dtype == torch.float32 else 5e-3
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < bound * (b - before).norm()
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, (a, b), strict=True)]
        assert states[0].keys() == states[1].keys() == {"momentum_buffer"}
        assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


def test_a_cpu_multiplies_in_fp32_matrices_of_one_short_side_together() -> None:
    """Iterations are of all of them; two products a shape are with the matrices themselves."""
    parameters = with_gradients(*SHAPES, *SHAPES, *SHAPES)
    alone = with_gradients(SHAPES[0])
    with Products() as products:
        Muon(parameters, lr=0.1, weight_decay=0.0).step()
    with Products() as products_of_one:
        Muon(alone, lr=0.1, weight_decay=0.0).step()
    assert {dtype for dtype, _ in products.seen} == {torch.float32}
    sides = {min(shape) for shape in SHAPES}
    iterations = len(products_of_one.seen) - 2
    assert len(products.seen) == len(sides) * iterations + 2 * len(SHAPES)


def test_bf16_matrices_of_one_short_side_are_padded_where_they_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch's, alone or padded, in as many products for all shapes as for one."""
    monkeypatch.setattr(muon, "matmul_dtype", lambda device: torch.bfloat16)
    shapes = [shape for shape in SHAPES if min(shape) == 16]
    padded, alone = (with_gradients(*shapes, *shapes) for _ in range(2))
    with Products() as products:
        Muon(padded, lr=0.1, weight_decay=0.3).step()
    assert [dtype for dtype, _ in products.seen] == [torch.bfloat16] * 3 * NUM_STEPS
    monkeypatch.setattr(muon, "_MAX_PADDED", 0)
    with Products() as products:
        Muon(alone, lr=0.1, weight_decay=0.3).step()
    assert len(products.seen) == 3 * NUM_STEPS * len(shapes)
    for a, b, before in zip(padded, alone, with_gradients(*shapes, *shapes), strict=True):
        assert (a - b).norm() < 5e-3 * (b - before).norm()


def test_a_flag_on_the_device_skips_a_step_of_gradients_that_are_not_finite() -> None:
    """Weights and momenta keep their bits; without the flag a step is that without skipping."""
    skipped, kept, plain = (with_gradients(*SHAPES) for _ in range(3))
    optimizers = [Muon(params, lr=0.1, weight_decay=0.3) for params in (skipped, kept, plain)]
    skippable_step.step_with_skip(optimizers[0], torch.tensor(0.0))
    state = [optimizers[0].state[p]["momentum_buffer"].clone() for p in skipped]
    weights = [p.detach().clone() for p in skipped]
    for p in skipped:
        assert p.grad is not None
        p.grad.fill_(torch.nan)
    skippable_step.step_with_skip(optimizers[0], torch.tensor(1.0))
    for p, weight, momentum in zip(skipped, weights, state, strict=True):
        assert torch.equal(p, weight)
        assert torch.equal(optimizers[0].state[p]["momentum_buffer"], momentum)
    for _ in range(3):
        skippable_step.step_with_skip(optimizers[1], torch.tensor(0.0))
        optimizers[2].step()
    for a, b, before in zip(kept, plain, with_gradients(*SHAPES), strict=True):
        assert (a - b).norm() < 1e-4 * (b - before).norm()


def test_a_skipped_first_step_leaves_momenta_of_zeros() -> None:
    params = with_gradients(*SHAPES)
    optimizer = Muon(params, lr=0.1, weight_decay=0.0)
    for p in params:
        assert p.grad is not None
        p.grad.fill_(torch.inf)
    skippable_step.step_with_skip(optimizer, torch.tensor(1.0))
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in params)


def test_what_is_multiplied_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (with_gradients(*[(16, 48)] * 7) for _ in range(2))
    Muon(whole, lr=0.1, weight_decay=0.0).step()
    monkeypatch.setattr(skippable_step, "_MAX_ELEMENTS_CPU", 3 * 16 * 48)
    with Products() as products:
        Muon(parts, lr=0.1, weight_decay=0.0).step()
    assert max(elements for _, elements in products.seen) == 3 * 16 * 48
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_an_optimiser_reads_what_torchs_wrote(tmp_path: Path) -> None:
    """A checkpoint of torch.optim.Muon continues as one of ours does."""

    def resumed(optimizer_of_before: type[torch.optim.Muon]) -> ViT:
        model, other = runs.small_vit(), runs.small_vit()
        optimizer = build_optimizer(CONFIG, model)
        before = optimizer_of_before(optimizer.optimizers[1].param_groups, lr=0.1, weight_decay=0.1)
        before.state = optimizer.state
        optimizer.optimizers = (optimizer.optimizers[0], before)
        runs.run(CONFIG, model, optimizer, steps=range(2))
        folder = tmp_path / optimizer_of_before.__module__
        with Saver(folder, keep=1) as saver:
            saver.save(step=2, model=model, optimizer=optimizer, state={})
        ours = build_optimizer(CONFIG, other)
        checkpoint.latest(folder).load_model(other)
        checkpoint.latest(folder).load_optimizer(other, ours)
        runs.run(CONFIG, other, ours, steps=range(2, 6))
        return other

    theirs, ours = resumed(torch.optim.Muon), resumed(Muon)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.02, msg=name)


def test_a_closure_is_refused() -> None:
    with pytest.raises(AssertionError, match="closure: expected none"):
        Muon(with_gradients((2, 2)), lr=1.0, weight_decay=0.0).step(lambda: 0.0)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_torchs_within_bf16() -> None:
    ours, theirs, start = (
        [nn.Parameter(p.detach().cuda()) for p in with_gradients(*SHAPES * 2)] for _ in range(3)
    )
    for group in (ours, theirs):
        for p, drawn_p in zip(group, with_gradients(*SHAPES * 2), strict=True):
            assert drawn_p.grad is not None
            p.grad = drawn_p.grad.cuda()
    with Products() as products:
        Muon(ours, lr=0.1, weight_decay=0.3).step()
    torch.optim.Muon(theirs, 0.1, 0.3).step()
    assert {dtype for dtype, _ in products.seen} == {torch.bfloat16}
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - before).norm()
