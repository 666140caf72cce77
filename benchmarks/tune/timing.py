"""The timing half of a sweep: candidates' operators beside each other, checked first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.benchmarks.core.harness import Timing, measure
from m3i_fast.benchmarks.tune.build import build_ops
from m3i_fast.benchmarks.tune.candidates import POINTS, Subject, with_policy
from m3i_fast.ops import reference
from m3i_fast.ops.tiles import Policy, Table

# Ragged calls of the same class, small enough for plain torch in float64.
_CHECKED = {"small": (2, 13, 15, 64, 4), "large": (1, 29, 31, 64, 4)}
_CHECKED_ROWS = (300, 520, 72)

# Of the largest magnitude of what is expected. Tensor cores multiply float32 as pairs of tf32.
_ALLOWED = {torch.bfloat16: 2.0**-6, torch.float32: 1e-4}

Run = Callable[..., list[Tensor]]  # of an operators' namespace and the inputs


def build_candidate(subject: Subject, table: Table, policy: Policy) -> Path:
    """Build a candidate's operators; calls of every size take its tiles."""
    filled = with_policy(table, subject, policy)
    if subject.op == "dcnv3" and subject.card != "cpu":
        filled = deepcopy(filled)
        for card in ("a100", "h100"):
            filled[card] = {kind: dict(policy) for kind in filled[card]}
    return build_ops(subject.op, filled, subject.card)


def make_run(subject: Subject, shape: tuple[int, ...], device: str) -> tuple[Run, list[Tensor]]:
    """Return a call, forward and backward, over inputs of a seed, and these inputs."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, subject.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if subject.op == "dcnv3":
        batch, height, width, channels, groups = shape
        image = batch, height, width
        sizes = channels, groups * POINTS * 2, groups * POINTS, channels
        inputs = [normal(*image, size).to(dtype) for size in sizes]
        return _dcnv3(groups), inputs
    rows, columns, width = shape
    features = [torch.nn.functional.normalize(normal(n, width)).to(dtype) for n in (rows, columns)]
    weights = [normal(3, n).abs() for n in (rows, columns)]
    return _boltzmann(rows, columns, device), [*features, *weights]


def _dcnv3(groups: int) -> Run:
    geometry = [3, 3], [1, 1], [1, 1], [1, 1], groups, 1.0, False, False

    def run(ops: Any, x: Tensor, offset: Tensor, mask: Tensor, grad: Tensor) -> list[Tensor]:
        out = ops.dcnv3.default(x, offset, mask, *geometry)
        grads = ops.dcnv3_bwd.default(grad, x, offset, mask, *geometry, [True] * 3, False)
        return [out, *grads]

    return run


SCALE = 10.0  # of logits, which it bounds: features have length 1


def _boltzmann(rows: int, columns: int, device: str) -> Run:
    """Row i and column i are a pair; what every call needs besides features is made here."""
    scale, bias = torch.tensor(SCALE, device=device), torch.zeros(columns, device=device)
    ids = torch.arange(rows, dtype=torch.int32, device=device)
    shifts = torch.full((rows,), SCALE, device=device), bias + SCALE
    exact = torch.tensor(False, device=device)

    def run(
        ops: Any, z_hat: Tensor, z: Tensor, row_weights: Tensor, col_weights: Tensor
    ) -> list[Tensor]:
        features = z_hat, z, scale, bias, ids, None, *shifts
        sums = ops.boltzmann_sums.default(*features, False, True, False, None)
        rest = exact, row_weights, col_weights, False, [True, True, False]
        return [*sums, *ops.boltzmann_grads.default(*features, *rest)[:3]]

    return run


# ---- What is right -------------------------------------------------------------------------------


def expected(subject: Subject, inputs: list[Tensor]) -> list[Tensor]:
    """Return the same results in plain torch and float64."""
    wide = [tensor.double() for tensor in inputs]
    if subject.op == "dcnv3":
        *leaves, grad = (tensor.requires_grad_() for tensor in wide)
        groups = leaves[2].shape[-1] // POINTS
        out = reference.dcnv3(
            *leaves, kernel_size=(3, 3), stride=1, padding=1, dilation=1, groups=groups
        )
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.detach())]
    return _expected_boltzmann(*wide)


def _expected_boltzmann(
    z_hat: Tensor, z: Tensor, row_weights: Tensor, col_weights: Tensor
) -> list[Tensor]:
    """cuda/boltzmann/params.h, with all logits as an array; row i and column i are a pair."""
    dots = z_hat @ z.T
    logits = SCALE * dots
    positive = torch.eye(*dots.shape, dtype=torch.bool, device=dots.device)
    e = torch.exp(logits - SCALE)
    kinds = [e * ~positive, e * positive, logits * positive, positive.double()]
    rows, columns = (torch.stack([kind.sum(axis) for kind in kinds]) for axis in (1, 0))
    of_both = row_weights[:, :, None] + col_weights[:, None, :]
    g = torch.where(positive, e * of_both[1] - of_both[2], e * of_both[0])
    return [rows, columns, g @ z, g.T @ z_hat, (g * dots).sum()]


def check(subject: Subject, ops: Any, device: str) -> str | None:
    """Return how the candidate's results differ from plain torch's; None if they do not."""
    kind = "small" if subject.kind in ("small", "any") else "large"
    shape = _CHECKED[kind] if subject.op == "dcnv3" else _CHECKED_ROWS
    run, inputs = make_run(subject, shape, device)
    results = run(ops, *inputs)
    allowed = _ALLOWED[inputs[0].dtype]
    for index, (got, wanted) in enumerate(zip(results, expected(subject, inputs), strict=True)):
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        if not error <= allowed:
            return f"result {index}: off by {error:.2g} of the largest, {allowed:.2g} allowed"
    return None


# ---- Time ----------------------------------------------------------------------------------------


def time_candidates(
    subject: Subject, built: Mapping[str, Any], device: str, num_samples: int
) -> dict[str, Timing]:
    """Time forward and backward of the subject's call, by the name of the candidate."""
    run, inputs = make_run(subject, subject.shape, device)

    def call(ops: Any) -> Callable[[], object]:
        return lambda: run(ops, *inputs)

    functions = {name: call(ops) for name, ops in built.items()}
    return measure(functions, device=device, num_samples=num_samples)


def fastest(timings: Mapping[str, Timing], current: str) -> str:
    """Return the fastest if its slow samples beat the current policy's fast ones; else that."""
    best = min(timings, key=lambda name: timings[name].median_ms)
    return best if timings[best].p80_ms < timings[current].p20_ms else current
