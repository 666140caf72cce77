"""The plainly written step has the losses and gradients of ours; both are timed and recorded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.training import plain_step as step_eager
from m3i_fast.benchmarks.training import step
from m3i_fast.benchmarks.training.step import Config
from m3i_fast.config import TrainConfig
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.train_step import ForwardPass
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import no_stage
from m3i_fast.pipelines.batch import Batch

TINY = Config(device="cpu", batch_size=6, dim=64, depth=1, num_samples=2)
ARGUMENTS = "--device cpu --batch-size 6 --dim 64 --depth 1 --num-samples 2".split()


def _partly_annotated(batch: Batch) -> Batch:
    """Some without a label, some without a caption, two of one group."""
    num_tokens = batch.num_tokens.masked_fill(torch.arange(6) == 2, 0)
    label = batch.label.masked_fill(torch.arange(6) % 4 == 1, -1)
    group_id = torch.tensor([0, 1, 2, 3, 0, 5])
    return replace(batch, num_tokens=num_tokens, label=label, group_id=group_id)


def _value_and_gradients(train: TrainConfig, batch: Batch, loss_of: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = build_objective(train)
    with torch.no_grad():  # or the EMA encoder would still be the encoder
        for parameter in model.target_encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    loss = loss_of(model, batch, step.draw(train, batch, 3))
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    return {"loss": loss.detach(), **found}


def _our_loss(model: MutualInformation, batch: Batch, mix: Mix) -> Tensor:
    loss: Tensor = ForwardPass(model)(batch, mix, no_stage, monitor=False, measure=False)[0]
    return loss


@pytest.mark.parametrize("asked_only", [False, True])
@pytest.mark.parametrize("annotated", ["whole", "in part"])
def test_the_eager_loss_is_ours_in_value_and_gradient(asked_only: bool, annotated: str) -> None:
    train = step.train_config(TINY)
    batch = draw_batch(train)
    if annotated == "in part":
        batch = _partly_annotated(batch)
    eager = _value_and_gradients(
        train, batch, partial(step_eager.eager_loss, asked_only=asked_only)
    )
    ours = _value_and_gradients(train, batch, _our_loss)
    assert eager.keys() == ours.keys()
    for name, expected in ours.items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(eager[name], expected, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_the_eager_average_is_ours() -> None:
    models = [ViT(step.train_config(TINY).vision) for _ in range(2)]
    for model in models:
        for number, parameter in enumerate(model.parameters()):
            nn.init.constant_(parameter, float(number + (model is models[1])))
    expected = [0.9 * a + 0.1 * b for a, b in zip(*(m.parameters() for m in models), strict=True)]
    step_eager.eager_ema(*models, momentum=0.9)
    for got, value in zip(models[0].parameters(), expected, strict=True):
        torch.testing.assert_close(got, value)


def test_a_step_learns() -> None:
    train = step.train_config(TINY)
    batch = draw_batch(train)
    for take in (
        step.our_step(train, batch),
        step.eager_step(train, batch, step_eager.eager_loss),
    ):
        losses = [float(take()) for _ in range(12)]
        assert losses[-1] < 0.8 * losses[0]


def test_steps_go_on_where_the_schedules_end() -> None:
    train = replace(step.train_config(TINY), num_steps=2)
    for take in step.make_steps(train).values():  # each has taken one
        assert all(torch.isfinite(take()) for _ in range(3))


def test_rows_are_shown_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    step.main(ARGUMENTS)
    (row,) = (row["figures"] for row in ledger.read_rows("step"))
    timings = row["timings"]
    assert set(timings) == {"m3i_fast", "eager", "eager, asked only"}
    milliseconds = timings["m3i_fast"]["median_ms"]
    assert row["images_per_s"]["m3i_fast"] == pytest.approx(6000 / milliseconds)
    ratio = timings["eager"]["median_ms"] / milliseconds
    assert row["times_slower_than_ours"]["eager"] == pytest.approx(ratio)
    shown = capsys.readouterr().out
    assert "6x64^2, 64x1" in shown and str(tmp_path) in shown

    step.main([*ARGUMENTS, "--no-record"])
    assert len(list(ledger.read_rows("step"))) == 1


def test_different_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_eager.normalise
    monkeypatch.setattr(step_eager, "normalise", lambda views: right(views) + 0.1)
    with pytest.raises(AssertionError, match="Scalars are not close|Tensor-likes are not close"):
        step.make_steps(step.train_config(TINY))


@pytest.mark.parametrize(
    ("field", "value"), [("num_samples", 0), ("depth", 0), ("batch_size", 5), ("dim", 100)]
)
def test_config_names_a_bad_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value}"):
        Config(**{field: value})  # type: ignore[arg-type]
