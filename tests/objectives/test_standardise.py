"""Standardised targets: against torch's batch norm and scikit-learn's scaler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from m3i_fast.objectives.standardise import EPS, Standardise
from tests.shared.small_objective import (
    build_model,
    draw_small_mix,
    loss_of,
    make_batch,
    make_config,
)

DIM = 6


def _rows(seed: int, count: int = 40) -> Tensor:  # [count, DIM]
    """Of channels with a mean and a spread of their own, far from zero."""
    rng = torch.Generator().manual_seed(seed)
    scale, mean = torch.linspace(0.1, 4, DIM), torch.linspace(-30, 50, DIM)
    return torch.randn(count, DIM, generator=rng) * scale + mean


def test_over_a_batch_it_is_torchs_batch_norm() -> None:
    norm = nn.BatchNorm1d(DIM, affine=False, eps=EPS)
    ours = Standardise(DIM, "batch", None)
    rows = _rows(0)
    found = ours(rows.view(4, 10, DIM)).view(40, DIM)
    torch.testing.assert_close(found, norm(rows), rtol=1e-4, atol=1e-4)  # means are 300 stds away
    assert not list(ours.buffers())
    ours.fold()  # nothing to remember


def test_running_statistics_are_of_earlier_steps() -> None:
    """The first step's targets are left as they are, the second's scaled by the first's."""
    ours = Standardise(DIM, "running", None)
    first, second = _rows(0), _rows(1)
    torch.testing.assert_close(ours(first), first, rtol=1e-5, atol=0)
    ours.fold()
    scaler = StandardScaler().fit(first.double().numpy())
    expected = scaler.transform(second.double().numpy())
    np.testing.assert_allclose(ours(second).numpy(), expected, rtol=2e-3, atol=2e-3)
    ours.fold()
    # Bias-corrected: after two steps of momentum 0.9 the newer weighs 1 / 1.9.
    newer = StandardScaler().fit(second.double().numpy())
    mean = (0.9 * scaler.mean_ + newer.mean_) / 1.9
    np.testing.assert_allclose(ours.mean.numpy(), mean, rtol=1e-5)
    variance = (0.9 * scaler.var_ + newer.var_) / 1.9
    np.testing.assert_allclose(ours.variance.numpy(), variance, rtol=1e-4)


def test_parts_of_a_step_count_as_the_whole_and_change_nothing_in_it() -> None:
    whole, parts = (Standardise(DIM, "running", None) for _ in range(2))
    for step in range(3):
        rows = _rows(step)
        by_whole = whole(rows)
        by_parts = torch.cat([parts(part) for part in rows.split([3, 17, 20])])
        torch.testing.assert_close(by_whole, by_parts)
        whole.fold()
        parts.fold()
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.variance, parts.variance)


def test_evaluation_and_steps_without_rows_leave_no_trace() -> None:
    ours = Standardise(DIM, "running", None)
    ours(_rows(0))
    ours.fold()
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    ours.eval()(_rows(1))
    ours.train()(_rows(1)[:0])
    ours.fold()
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())
    assert int(ours.num_folds) == 1
    assert set(ours.state_dict()) == {"mean", "variance", "num_folds"}


@pytest.mark.parametrize("over", ["running", "batch"])
def test_a_constant_is_no_target_any_more(over: str) -> None:
    """A common vector added to all cells changes neither the dense losses nor what they teach."""
    cfg = make_config()
    terms = tuple(replace(t, standardise=over) if t.is_dense else t for t in cfg.terms)  # type: ignore[arg-type]
    cfg = replace(cfg, terms=terms)
    batch = make_batch()
    model, mix = build_model(cfg), draw_small_mix(cfg, batch)
    targets = model.encode_targets(batch, mix)
    moved = replace(targets, tokens={s: t + 5.0 for s, t in targets.tokens.items()})
    found = []
    for of_step in (targets, moved):
        model = build_model(cfg)
        for _ in range(2):  # the second step has the statistics of the first
            encoded = model.encode_inputs(batch, mix)
            metrics = model(encoded, of_step, batch, mix)[1]
            model.finish_step()
        found.append([metrics["loss/intra"], metrics["loss/inter"]])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_what_it_is_for() -> None:
    with pytest.raises(ValueError, match=r"term 'caption': standardise: expected none for caption"):
        replace(make_config().terms[3], standardise="running")


@pytest.mark.parametrize("projector", ["mlp", "batch_norm"])
def test_a_projector_stands_on_both_sides_and_follows(projector: str) -> None:
    cfg = make_config()
    cfg = replace(cfg, decoder=replace(cfg.decoder, dim=24, projector=projector))  # type: ignore[arg-type]
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    decoder = model.decoders["features_momentum"]
    average = model.target_projectors["features_momentum"]
    assert decoder.head.out_features == decoder.projector[-1 - (projector != "mlp")].out_features
    pairs = list(model.momentum_pairs())
    assert (average, decoder.projector) in pairs and len(pairs) == 2
    total, metrics = loss_of(model, batch, mix)
    total.backward()
    assert all(p.grad is None for p in average.parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in decoder.projector.parameters())
    with torch.no_grad():  # targets come through the average
        for parameter in average.parameters():
            parameter.mul_(-1.5).add_(0.1)
    changed = loss_of(model, batch, mix)[1]
    assert float(changed["loss/inter"]) != float(metrics["loss/inter"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    again = build_model(cfg)
    torch.manual_seed(0)
    again.reset_parameters()
    assert state.keys() == again.state_dict().keys()
    for a, b in zip(
        again.target_projectors.parameters(),
        again.decoders["features_momentum"].projector.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)
