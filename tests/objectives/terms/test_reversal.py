"""Gradient reversal on columns: beside a reversal written by hand, its rise, and what it is for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from m3i_fast.cli.methods import explain
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.objectives.methods import METHODS, Method
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms.reversal import Reversal
from tests.shared.annotated import NO_TARGETS, TERMS, annotated_batch, build, encode, objective
from tests.shared.small_objective import draw_small_mix

NAMES = "genus", "tags", "sizes"


def gradients(cfg: ObjectiveConfig) -> tuple[Tensor, dict[str, Tensor], MutualInformation]:
    """By the encoder's tokens, and by what is learnt beside the encoder, in fp64."""
    model, batch = build(cfg).double(), annotated_batch()
    mix = draw_small_mix(cfg, batch)
    encoded = encode(model, mix)
    total, _ = model(encoded, NO_TARGETS, batch, mix)
    total.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    (tokens,) = encoded.views
    assert tokens.grad is not None
    return tokens.grad, found, model


class ByHand(torch.autograd.Function):
    """-0.7 times the gradient, as one writes it."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad.neg() * 0.7


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_gets_the_gradient_reversed_and_the_head_as_it_is(name: str) -> None:
    plain, of_head, _ = gradients(objective(name))
    reversed_, beside, _ = gradients(objective(name, reversal=0.7))
    torch.testing.assert_close(reversed_, -0.7 * plain, rtol=1e-10, atol=1e-16)
    assert of_head.keys() == beside.keys()
    for parameter, grad in of_head.items():
        torch.testing.assert_close(beside[parameter], grad, rtol=1e-10, atol=1e-16)
        assert name in parameter


def test_it_is_torchs_gradient_through_a_reversal_written_by_hand() -> None:
    """With a second term that reads the same features without one."""
    cfg = objective("genus", "sizes")
    first = replace(cfg.terms[0], reversal=0.7, weight=2.0)
    cfg = replace(cfg, terms=(first, cfg.terms[1]))
    ours, beside, model = gradients(cfg)
    batch = annotated_batch()
    mix = draw_small_mix(cfg, batch)
    tokens = encode(model, mix).views[0]
    genus, sizes = model.terms["genus"], model.terms["sizes"]
    mean = tokens.mean(1)
    label = batch.columns["genus"][mix.sample]
    known = label >= 0
    unit = torch.nn.functional.normalize
    logits = (
        genus.log_scale.exp()
        * unit(genus.head.of_means(ByHand.apply(mean)))
        @ unit(genus.embedding).T
    )
    of_genus = (
        torch.nn.functional.cross_entropy(logits[known], label[known]) * known.double().mean()
    )
    z = ((batch.columns["sizes"] - sizes.mean) / sizes.std)[mix.sample]
    seen = ~z.isnan()
    error = ((sizes.head.of_means(mean) - z.nan_to_num()) * seen).square()
    of_sizes = (error.sum(1) / seen.sum(1).clamp_min(1)).mean()
    learnt = {n: p for n, p in model.named_parameters() if n in beside}
    expected = torch.autograd.grad(2 * of_genus + of_sizes, [tokens, *learnt.values()])
    for a, b in zip((ours, *(beside[n] for n in learnt)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_the_factor_rises_as_danns() -> None:
    ours, like = Reversal(0.5, 8), torch.zeros((), dtype=torch.float64)
    for step in range(11):
        p = min(step / 8, 1)
        expected = 0.5 * (2 / (1 + np.exp(-10 * p)) - 1) if p < 1 else 0.5
        assert float(ours.factor(like)) == pytest.approx(expected, rel=1e-12)
        ours.advance()
    ours.reset_parameters()
    assert float(ours.factor(like)) == 0
    assert not Reversal(0.5, 0).state_dict()


def test_a_step_counts_once_and_is_saved_with_the_model() -> None:
    cfg = objective("genus", reversal=1.0, reversal_steps=4)
    model, batch = build(cfg).double(), annotated_batch()
    mix = draw_small_mix(cfg, batch)
    seen = []
    for _ in range(6):
        for _ in range(2):  # two batches of one step
            metrics = model(encode(model, mix), NO_TARGETS, batch, mix, monitor=True)[1]
        seen.append(float(metrics["monitor/genus_reversal"]))
        model.finish_step()
    assert seen[0] == 0 and seen[4:] == [1, 1]
    assert all(a < b for a, b in zip(seen[:4], seen[1:5], strict=True))
    again = build(cfg)
    again.load_state_dict(model.state_dict())
    assert float(again.terms["genus"].reversal.factor(torch.zeros(()))) == 1
    assert 0 <= float(metrics["monitor/genus_accuracy"]) <= 1


def test_it_makes_an_encoder_forget() -> None:
    """Of two features the one that tells the class is scaled down, the other one is not."""
    torch.manual_seed(0)
    label = torch.randint(0, 2, (400,))
    pictures = torch.stack([2.0 * label - 1 + 0.1 * torch.randn(400), torch.randn(400)], 1)
    encoder, head = torch.ones(2, requires_grad=True), torch.nn.Linear(2, 2)
    descent = torch.optim.SGD(
        [{"params": [encoder], "lr": 0.02}, {"params": head.parameters(), "lr": 1.0}],
        weight_decay=0.01,
    )
    reversal = Reversal(1.0, 0)
    for _ in range(300):
        descent.zero_grad()
        features = pictures * encoder
        told = torch.nn.functional.cross_entropy(head(reversal(features)), label)
        kept = (features[:, 1] - pictures[:, 1]).square().mean()
        (told + kept).backward()
        descent.step()
    tells, other = encoder.tolist()
    assert abs(tells) < 0.5 < other


def test_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    term = replace(TERMS["genus"], reversal=0.5, reversal_steps=100)
    method = Method(title="DANN", paper="none", family="supervised", terms=(term,))
    monkeypatch.setitem(METHODS, "dann", method)
    assert "  gradient of the encoder reversed: times -0.5, rising over 100 steps" in explain(
        "dann"
    )


def test_what_it_is_for() -> None:
    with pytest.raises(ValueError, match=r"reversal: expected >= 0, and 0 for caption .*, got 1.0"):
        replace(TERMS["alt"], reversal=1.0)
    with pytest.raises(ValueError, match=r"reversal: expected >= 0, and 0 for embedding"):
        replace(METHODS["byol"].terms[0], reversal=1.0)
    with pytest.raises(ValueError, match=r"reversal: expected >= 0, .*got -1.0"):
        replace(TERMS["genus"], reversal=-1.0)
    with pytest.raises(ValueError, match=r"reversal_steps: expected 0 without reversal, got 5"):
        replace(TERMS["genus"], reversal_steps=5)
