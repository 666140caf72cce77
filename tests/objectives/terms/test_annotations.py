"""Tokens of captions, sets of labels and numbers against torch, open_clip and scikit-learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, r2_score
from torch import Tensor

from m3i_fast.config.objective.heads import CaptionerConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.objectives.losses.annotations import binary_cross_entropy, known_squares
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms import CaptionTokens
from m3i_fast.objectives.terms.labels import accuracy
from m3i_fast.pipelines.batch import Batch
from tests.shared.annotated import (
    COLUMNS,
    NO_TARGETS,
    annotated_batch,
    build,
    encode,
    objective,
)
from tests.shared.small_objective import draw_small_mix
from tests.shared.torch_decoder import hidden_of


def run(cfg: ObjectiveConfig, batch: Batch, **facts: Any) -> dict[str, Tensor]:
    """What a step logs."""
    model = build(cfg)
    mix = draw_small_mix(cfg, batch)
    encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
    total, metrics = model(encoded, targets, batch, mix, **facts)
    total.backward()
    return metrics


# ---- Losses --------------------------------------------------------------------------------------


def test_labels_are_torchs_binary_cross_entropy_of_the_members() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    z, members = torch.rand(6, 5).round().double(), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    ours = binary_cross_entropy(logits, z, members=members)
    theirs = F.binary_cross_entropy_with_logits(logits[members], z[members])
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, logits)),
        (theirs, *torch.autograd.grad(theirs, logits)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    shares = logits[members].sigmoid().detach().numpy()
    each = [log_loss(z[members][:, i], shares[:, i], labels=[0, 1]) for i in range(5)]
    assert float(ours.detach()) == pytest.approx(sum(each) / 5, rel=1e-10)


def test_numbers_are_torchs_squares_of_those_that_are_known() -> None:
    torch.manual_seed(0)
    z_hat = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 3, dtype=torch.float64)
    z[0, 1], z[2], z[4, :2] = torch.nan, torch.nan, torch.nan
    ours = known_squares(z_hat, z, sigma=0.5)
    rows = [F.mse_loss(p[~t.isnan()], t[~t.isnan()]) for p, t in zip(z_hat, z, strict=True)]
    some = [row for row, t in zip(rows, z, strict=True) if not t.isnan().all()]
    theirs = torch.stack(some).mean() / 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    (a,), (b,) = (torch.autograd.grad(loss, z_hat) for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert (a[z.isnan()] == 0).all()


def test_rows_without_a_target_give_zero() -> None:
    z_hat = torch.randn(3, 2, requires_grad=True)
    nothing = torch.full((3, 2), torch.nan)
    losses = (
        known_squares(z_hat, nothing, sigma=1.0),
        binary_cross_entropy(z_hat, torch.zeros(3, 2), members=torch.zeros(3).bool()),
    )
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, z_hat)
        assert float(loss.detach()) == 0 and (grad == 0).all()


# ---- Terms ---------------------------------------------------------------------------------------


def _logits(
    model: MutualInformation, cells: Tensor, batch: Batch, mix: Mix
) -> tuple[Tensor, Tensor]:
    """Logits of torch's decoder and a product of all tokens, and their targets, -100 for none."""
    (term,) = model.terms_of(CaptionTokens)
    ids = batch.token_ids[mix.sample]
    share = term.decoder.cfg.parallel
    parallel = mix.token_priority[mix.sample, 0] < share if share else None
    logits = hidden_of(term.decoder, cells, ids, parallel) @ term.vocabulary.T
    place = torch.arange(1, ids.shape[1])
    targets = ids[:, 1:].long().masked_fill(place >= batch.num_tokens[mix.sample, None], -100)
    return logits.flatten(0, 1), targets.flatten()


@pytest.mark.parametrize("mode", ["none", "own_image", "joint", "masked"])
@pytest.mark.parametrize("parallel", [0.0, 0.75])
def test_tokens_of_captions_are_torchs_cross_entropy(mode: str, parallel: float) -> None:
    """Samples without a caption, and padding, count in no mean over members."""
    batch = annotated_batch()
    for mean in ("members", "batch"):
        cfg = objective("tokens", parallel=parallel, mode=mode, mean=mean)
        model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
        encoded = encode(model, mix)
        total, metrics = model(encoded, NO_TARGETS, batch, mix)
        logits, targets = _logits(model, encoded.views[0], batch, mix)
        captioned = (batch.num_tokens > 1).sum()
        share = captioned / batch.batch_size if mean == "batch" else 1.0
        expected = F.cross_entropy(logits, targets) * share
        torch.testing.assert_close(total, expected, rtol=1e-10, atol=0)
        assert metrics["members/tokens"] == captioned
        learnt = [*encoded.views, *model.terms.parameters()]
        pairs = (
            torch.autograd.grad(x, learnt, allow_unused=True, materialize_grads=True)
            for x in (total, expected)
        )
        for a, b in zip(*pairs, strict=True):
            assert (a - b).norm() <= 1e-10 * max(float(b.norm()), 1.0)


def test_the_share_of_parallel_captions_is_drawn_by_position() -> None:
    batch, cfg = annotated_batch(), objective("tokens", parallel=0.75)
    whole = draw_small_mix(cfg, batch).token_priority[:, 0] < 0.75
    assert 0 < whole.sum() < len(whole)
    later = replace(batch, position=batch.position + 3)
    moved = draw_small_mix(cfg, later).token_priority[:, 0] < 0.75
    assert torch.equal(whole[3:], moved[:-3])


def test_blended_pictures_have_each_their_caption_by_their_share() -> None:
    batch, cfg = annotated_batch(), objective("tokens", mode="blend", mean="members")
    model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
    encoded = encode(model, mix)
    total, _ = model(encoded, NO_TARGETS, batch, mix)
    logits, targets = _logits(model, encoded.views[0], batch, mix)
    halves = zip(logits.chunk(2), targets.chunk(2), strict=True)
    first, second = (F.cross_entropy(*half) for half in halves)
    share = mix.share[0].double()
    torch.testing.assert_close(total, share * first + (1 - share) * second, rtol=1e-10, atol=0)


def test_columns_are_predicted_from_the_mean_cell() -> None:
    batch = annotated_batch()
    cfg = objective("tags", "sizes", "genus", mean="members")
    model, mix = build(cfg).double(), draw_small_mix(cfg, batch)
    encoded = encode(model, mix)
    _, metrics = model(encoded, NO_TARGETS, batch, mix)
    mean = encoded.views[0].mean(1)
    tags, known = batch.columns["tags"], batch.columns["tags"][:, 0] != -2
    hot = torch.stack([F.one_hot(row[row >= 0], 7).sum(0) for row in tags]).double()
    logits = model.terms["tags"].head.of_means(mean)
    expected = F.binary_cross_entropy_with_logits(logits[known], hot[known])
    torch.testing.assert_close(metrics["loss/tags"], expected.detach(), rtol=1e-10, atol=0)
    assert metrics["members/tags"] == known.sum() == 6
    z = (batch.columns["sizes"].double() - torch.tensor([1.0, -2.0])) / torch.tensor([2.0, 0.5])
    z_hat = model.terms["sizes"].head.of_means(mean)
    rows = [(p - t).square().nanmean() for p, t in zip(z_hat, z, strict=True)]
    expected = torch.stack(rows).nanmean().detach()  # sigma^2 = 1 / 2
    torch.testing.assert_close(metrics["loss/sizes"], expected, rtol=1e-6, atol=0)
    term, label = model.terms["genus"], batch.columns["genus"]
    logits = term.logits(encoded.views[0])
    expected = F.cross_entropy(logits, label, ignore_index=-1).detach()
    torch.testing.assert_close(metrics["loss/genus"], expected, rtol=1e-10, atol=0)


def test_a_named_text_is_a_caption_of_its_own() -> None:
    """The same ids as the data set's captions or as a named column give the same loss."""
    batch = annotated_batch()
    place = torch.arange(6) >= batch.num_tokens[:, None]
    named = {**batch.columns, "alt": batch.token_ids.masked_fill(place, -1)}
    for target in ("tokens", "alt"):
        values = [
            run(objective(target, column=column), _with(batch, named))["loss/total"]
            for column in ("", "alt")
        ]
        assert torch.equal(*values) and values[0] > 0


def _with(batch: Batch, columns: dict[str, Tensor]) -> Batch:
    return Batch(
        **{n: getattr(batch, n) for n in batch.__slots__ if n != "columns"}, columns=columns
    )


def test_a_batch_without_annotations_gives_zero_and_gradients() -> None:
    batch = annotated_batch()
    empty = {
        "tags": torch.full_like(batch.columns["tags"], -2),
        "sizes": torch.full_like(batch.columns["sizes"], torch.nan),
        "alt": torch.full_like(batch.columns["alt"], -1),
        "genus": torch.full_like(batch.columns["genus"], -1),
        "objects": torch.full_like(batch.columns["objects"], -1),
    }
    batch = _with(batch, empty)
    batch.num_tokens.zero_()
    metrics = run(objective(), batch)
    assert all(float(value) == 0 for name, value in metrics.items() if name[:5] == "loss/")
    assert all(float(value) == 0 for name, value in metrics.items() if name[:5] == "membe")


def test_monitors() -> None:
    batch, cfg = annotated_batch(), objective()
    model, mix = build(cfg), draw_small_mix(cfg, batch)
    encoded = model.encode_inputs(batch, mix)
    metrics = model(encoded, model.encode_targets(batch, mix), batch, mix, monitor=True)[1]
    logits, targets = _logits(model, encoded.views[0], batch, mix)
    right = (logits.argmax(1) == targets)[targets >= 0].double().mean()
    assert float(metrics["monitor/tokens_accuracy"]) == pytest.approx(float(right))
    z = (batch.columns["sizes"] - torch.tensor([1.0, -2.0])) / torch.tensor([2.0, 0.5])
    predicted = model.terms["sizes"].predict(encoded.views[0])
    known = ~z.isnan()
    error = (predicted - batch.columns["sizes"]) / torch.tensor([2.0, 0.5])
    explained = 1 - error[known].square().mean()
    assert float(metrics["monitor/sizes_r2"]) == pytest.approx(float(explained), rel=1e-4)
    assert 0 <= float(metrics["monitor/tags_hit"]) <= 1


def test_one_less_the_error_is_r2_of_standardised_numbers() -> None:
    torch.manual_seed(0)
    z = torch.randn(200, dtype=torch.float64)
    z = (z - z.mean()) / z.std(correction=0)
    z_hat = z + 0.3 * torch.randn(200)
    assert float(1 - (z_hat - z).square().mean()) == pytest.approx(r2_score(z, z_hat))


def test_accuracy_is_of_tokens_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m3i_fast.objectives.terms.labels.LOGITS_AT_ONCE", 20)
    torch.manual_seed(0)
    rows, vocabulary = torch.randn(9, 4), torch.randn(7, 4)
    targets = (rows @ vocabulary.T).argmax(1)
    targets[2], targets[5], targets[7] = -1, -1, (targets[7] + 1) % 7
    assert float(accuracy(rows, vocabulary, targets)) == pytest.approx(6 / 7)
    assert float(accuracy(rows, vocabulary, torch.full((9,), -1))) == 0


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a column of numbers .* got 'tags'"):
        build(objective("sizes", column="tags"))
    with pytest.raises(ValueError, match="column: expected the name of a column of labels"):
        objective("tags", column="")
    with pytest.raises(ValueError, match="column: expected none for pixels, got 'tags'"):
        replace(METHODS["autoencoder"].terms[0], column="tags")
    with pytest.raises(ValueError, match="parallel: expected in .0, 1., got 1.5"):
        CaptionerConfig(parallel=1.5)
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads = 3, got 16"):
        CaptionerConfig(dim=16, num_heads=3)
    assert [column.kind for column in COLUMNS] == ["labels", "numbers", "text", "class", "regions"]
