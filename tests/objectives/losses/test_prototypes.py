"""Losses over prototypes against torch's expressions, which have all logits, and their memory.

Legend: N rows, E features, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.models.transformer.layers import reset
from m3i_fast.objectives.losses.stateful import (
    Balanced,
    Centred,
    JointlyBalanced,
    MeanEntropy,
    Prototypes,
)
from m3i_fast.objectives.terms.views import log_assignment
from m3i_fast.ops import boltzmann_rows
from tests.objectives.losses.oracles import draw
from tests.shared.allocated import most_allocated

N, E, K = 12, 6, 9
TEMPERATURE = 0.1


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(draw(*shape, seed=seed), dim=1)


Build = Callable[..., Prototypes]


def build(kind: Build) -> Prototypes:
    loss = Centred(TEMPERATURE, None, K) if kind is Centred else kind(TEMPERATURE, None)
    if isinstance(loss, Centred):
        loss.centre.copy_(0.1 * draw(K, seed=9))
    return loss.double()


def sinkhorn(logits: Tensor) -> Tensor:  # [N, K]
    for _ in range(3):
        logits = (logits - logits.logsumexp(0)).log_softmax(1)
    return logits.exp()


def by_torch(loss: Prototypes, views: list[Tensor], teacher: Tensor) -> list[Tensor]:
    """The assignment of each view, from all of its logits."""
    logits = [view @ teacher.T for view in views]
    if isinstance(loss, Centred):
        return [((each - loss.centre) / 0.04).softmax(1) for each in logits]
    if isinstance(loss, JointlyBalanced):
        return list(sinkhorn(torch.cat(logits) / 0.04).chunk(2))
    if isinstance(loss, Balanced):
        return [sinkhorn(each / 0.05) for each in logits]
    return [sinkhorn((each / 0.025).log_softmax(1)) for each in logits]


@pytest.mark.parametrize("kind", [Centred, Balanced, JointlyBalanced, MeanEntropy])
def test_values_and_gradients_are_those_of_all_logits(kind: Build) -> None:
    """Two target views, of unequal numbers of predictions, as a method with local views has."""
    loss, teacher = build(kind), unit(K, E, seed=1)
    views = [unit(N, E, seed=seed) for seed in (2, 3)]
    prototypes = unit(K, E, seed=4).requires_grad_()
    students = [unit(N, E, seed=seed).requires_grad_() for seed in (5, 6, 7)]
    pairs = ((0, 0), (1, 1), (2, 1))  # input, target view
    expected_targets = by_torch(loss, views, teacher)
    before = loss.centre.clone() if isinstance(loss, Centred) else None
    targets = loss.targets(views, teacher)
    got = loss([students[a] for a, _ in pairs], [targets[b] for _, b in pairs], prototypes)
    logits = torch.cat([students[a] @ prototypes.T / TEMPERATURE for a, _ in pairs])
    expected = F.cross_entropy(logits, torch.cat([expected_targets[b] for _, b in pairs]))
    if kind is MeanEntropy:
        share = logits.softmax(1).mean(0)
        expected = expected + (share * (share * K).log()).sum()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    leaves = [prototypes, *students]
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (got, expected)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if isinstance(loss, Centred):
        mean = torch.cat([view @ teacher.T for view in views]).mean(0)
        torch.testing.assert_close(loss.centre, 0.9 * before + 0.1 * mean, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [Centred, Balanced, JointlyBalanced, MeanEntropy])
def test_the_temperature_of_targets_moves_as_dinos(kind: type[Prototypes]) -> None:
    """numpy's linspace over the warm-up, as DINO's code; evaluation neither counts nor moves it."""
    options = {"target_temperature": 0.07, "target_warmup_steps": 5}
    args = (K,) if kind is Centred else ()
    loss, fixed = kind(TEMPERATURE, None, *args, **options), kind(TEMPERATURE, None, *args)
    starts = {Centred: 0.04, Balanced: 0.05, JointlyBalanced: 0.04, MeanEntropy: 0.025}
    start = starts[kind]
    teacher, view = unit(K, E, seed=1), unit(N, E, seed=2)
    expected = [*np.linspace(start, 0.07, 5), 0.07, 0.07]
    found = []
    for _ in expected:
        loss.eval().targets([view], teacher)
        found.append(1 / float(loss.train().targets([view], teacher)[0].scale))
        assert float(fixed.targets([view], teacher)[0].scale) == pytest.approx(1 / start)
    assert found == pytest.approx(expected, rel=1e-6)
    assert "target_scale.num_steps" in loss.state_dict()
    assert not any("num_steps" in name for name in fixed.state_dict())
    reset(loss)
    assert 1 / float(loss.targets([view], teacher)[0].scale) == pytest.approx(start)


def test_views_that_are_centred_alike_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    rows = boltzmann_rows.RowSoftmax.apply
    monkeypatch.setattr(
        boltzmann_rows.RowSoftmax, "apply", lambda *a: calls.append(len(a[0])) or rows(*a)
    )
    teacher, views = unit(K, E, seed=1), [unit(N, E, seed=seed) for seed in (2, 3)]
    for kind, expected in ((Centred, [2 * N]), (Balanced, [N, N]), (JointlyBalanced, [2 * N])):
        calls.clear()
        loss = build(kind)
        loss(views, loss.targets(views, teacher), teacher)
        assert calls == expected


@pytest.mark.parametrize("kind", [Centred, Balanced, JointlyBalanced, MeanEntropy])
def test_no_array_of_rows_and_prototypes(
    kind: type[Prototypes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets, loss, gradients and monitors take a block beside inputs and gradients."""
    rows, width, count, block = 1024, 8, 4096, 1 << 20
    monkeypatch.setitem(boltzmann_rows._BLOCK_BYTES, "cpu", block)
    loss = Centred(TEMPERATURE, None, count) if kind is Centred else kind(TEMPERATURE, None)
    teacher, view = unit(count, width, seed=1).float(), unit(rows, width, seed=2).float()
    prototypes, student = teacher.clone().requires_grad_(), view.clone().requires_grad_()
    features = (rows + count) * width * 4
    metrics: dict[str, Tensor] = {}

    def step() -> None:
        targets = loss.targets([view], teacher)
        log_assignment(metrics.__setitem__, "z", targets[0])
        loss([student], targets, prototypes).backward()

    step()
    assert set(metrics) == {"z_use", "z_doubt"}
    assert rows * count * 4 == 16 * block
    assert most_allocated(step) < 2 * block + 4 * features


def test_use_and_doubt_are_one_of_uniform_assignments_and_small_of_one_prototype() -> None:
    """Also of fewer rows than prototypes, whose mean is more even than sure rows can make it."""
    teacher, view = unit(64, 8, seed=1), unit(4, 8, seed=2)
    alike = view[:1].expand(4, -1)
    for temperature, rows, expected in ((1e4, view, (1, 1)), (1e-3, alike, (0, 0))):
        loss = Centred(TEMPERATURE, None, 64, target_temperature=temperature)
        metrics: dict[str, Tensor] = {}
        (targets,) = loss.targets([rows], teacher)
        log_assignment(metrics.__setitem__, "z", targets)
        found = [metrics["z_use"].item(), metrics["z_doubt"].item()]
        assert found == pytest.approx(expected, abs=1e-3) and found[0] <= 1


@pytest.mark.matrix
def test_dinos_size_takes_64_mib() -> None:
    """65,536 prototypes of 256 features, 4,096 rows: above inputs and gradients, forth and back."""
    rows, width, count = 4096, 256, 65536
    loss = Centred(TEMPERATURE, None, count)
    rng = torch.Generator().manual_seed(0)
    teacher, view = (
        F.normalize(torch.randn(n, width, generator=rng), dim=1) for n in (count, rows)
    )
    prototypes, student = teacher.clone().requires_grad_(), view.clone().requires_grad_()
    gradients = prototypes.nbytes + student.nbytes
    metrics: dict[str, Tensor] = {}

    def step() -> None:
        targets = loss.targets([view], teacher)
        log_assignment(metrics.__setitem__, "z", targets[0])
        value = loss([student], targets, prototypes)
        torch.autograd.grad(value, [student, prototypes])

    assert most_allocated(step) <= (64 << 20) + gradients
    assert 0 < metrics["z_doubt"] < 1
