"""Category and caption as expectations over samples: against sums of -log P in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.objectives.balance import Balance
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.pipelines.batch import Batch
from tests.shared.small_objective import (
    build_model,
    draw_small_mix,
    loss_of,
    make_batch,
    make_config,
)

LABELS = ("category", "caption")


def _config(mode: str, name: str, mean: str = "batch") -> ObjectiveConfig:
    cfg = make_config(mode, only=name)
    terms = tuple(t if t.is_dense else replace(t, mean=mean) for t in cfg.terms)  # type: ignore[arg-type]
    return replace(cfg, terms=terms)


def _nll(logits: Tensor, positive: Tensor) -> Tensor:  # [N, M], [N, M] bool -> []
    """The sum over rows of -log of the softmax at the row's one positive; 0 for rows of none."""
    return -(logits.log_softmax(1) * positive).sum()


def _sum_over_samples(name: str, model: MutualInformation, batch: Batch, mix: object) -> Tensor:
    """-log P of every sample that has a target, summed in fp64, over the number of samples."""
    term = model.terms[name]
    z_hat = term.embed(model.encode_inputs(batch, mix).views[0]).double()
    scale = term.log_scale.double().exp()
    of_image = mix.sample
    if name == "category":
        logits = scale * z_hat @ F.normalize(term.embedding.double(), dim=-1).T
        has = batch.label >= 0
        positive = F.one_hot(batch.label.clamp_min(0), logits.shape[1]).bool() & has[:, None]
        return _nll(logits, positive[of_image]) / len(of_image)
    z = term.embed_captions(batch.token_ids, batch.num_tokens).double()
    has = batch.num_tokens > 0
    logits = (scale * z_hat @ z.T)[:, has][has[of_image]]
    positive = (of_image[:, None] == torch.arange(len(has)))[:, has][has[of_image]]
    return (_nll(logits, positive) + _nll(logits.T, positive.T)) / 2 / len(of_image)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("mode", ["none", "joint"])
def test_a_term_is_the_sum_over_samples(name: str, mode: str) -> None:
    cfg = _config(mode, name)
    model, batch = build_model(cfg), make_batch()
    mix = draw_small_mix(cfg, batch)
    total, _ = loss_of(model, batch, mix)
    expected = _sum_over_samples(name, model, batch, mix)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    learnt = [p for p in model.terms[name].parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(value, learnt) for value in (total, expected.float()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", LABELS)
def test_one_annotated_picture_weighs_the_same_in_any_batch(name: str) -> None:
    """Its gradient by the head is 1 / B of it alone, where the mean over members is all of it."""
    for mean, times in (("batch", 8.0), ("members", 1.0)):
        cfg = _config("none", name, mean)
        model, batch = build_model(cfg), make_batch()
        first = torch.arange(8) == 0
        few = replace(
            batch,
            label=batch.label.masked_fill(~first, -1),
            num_tokens=batch.num_tokens * first,
        )
        alone = replace(_config("none", name, "members"))
        values = [loss_of(build_model(c), few, draw_small_mix(c, few))[0] for c in (cfg, alone)]
        torch.testing.assert_close(values[1], times * values[0], rtol=1e-6, atol=0)
        assert float(loss_of(model, few, draw_small_mix(cfg, few))[1][f"members/{name}"]) == 1


@pytest.mark.parametrize("mode", ["joint", "blend", "none"])
@pytest.mark.parametrize("name", LABELS)
def test_where_all_are_annotated_nothing_changes(name: str, mode: str) -> None:
    batch = make_batch()
    whole = replace(
        batch,
        label=torch.arange(8) % 5,
        token_ids=batch.token_ids.masked_fill(batch.token_ids == 0, 7),
        num_tokens=torch.full((8,), 6),
    )
    found = []
    for mean in ("batch", "members"):
        cfg = _config(mode, name, mean)
        model = build_model(cfg)
        total, _ = loss_of(model, whole, draw_small_mix(cfg, whole))
        total.backward()
        found.append([total, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_balance_takes_few_annotations_for_what_they_are() -> None:
    """Rows of gradients as large as each other: 2 of 8 give the norm that all 8 would give."""
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    per_row = F.normalize(torch.randn(8, 5), dim=1)
    each = (z * per_row).sum(1)
    has = torch.arange(8) < 2
    losses = {"all": each.mean(), "few": (each * has).sum() / 8}
    balance = Balance(BalanceConfig(mode="gradient_norm"), {"all": 1.0, "few": 1.0})
    balance.measure(losses, [z], {"few": has.float().mean()})
    torch.testing.assert_close(balance.norm[0], balance.norm[1])
    balance.reset_parameters()
    balance.measure(losses, [z])
    torch.testing.assert_close(balance.norm[0], 2 * balance.norm[1])
    # A step without any of them is no measurement, and leaves the norm as it was.
    before = balance.norm.clone()
    nobody = {"all": each.mean(), "few": each.sum() * 0}
    balance.measure(nobody, [z], {"few": torch.zeros(())})
    assert float(balance.norm[1]) == float(before[1]) and bool(balance.norm.isfinite().all())


def test_members_is_for_what_not_every_picture_has() -> None:
    with pytest.raises(ValueError, match=r"term 'intra': mean: expected batch for features"):
        replace(make_config().terms[0], mean="members")
    assert MixingConfig().mode == "joint"
