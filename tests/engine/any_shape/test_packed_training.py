"""Runs on views of any shape: squares train as squares, resumes are exact, conflicts are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.costs.packed_pictures import PackedPictures
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.open_loader import open_loader
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.any_shape.batch import PackedBatch, step_counts
from m3i_fast.planning.step_memory import trace
from m3i_fast.recipes import demo_method, shrink
from tests.shared.engine.packed_run import (
    PATCH,
    in_double,
    of_squares,
    packed_in_double_precision,
    packed_run,
    split,
)
from tests.shared.engine.parts_of_batches import in_dtype
from tests.shared.engine.small_run import TEXT, assert_same_run

NUM_STEPS = 4


def trained(cfg: TrainConfig, out: Path, *, double: bool) -> dict[str, Tensor]:
    """Losses and weights after some steps on the config's own data."""
    found: dict[str, Tensor] = {}
    with packed_in_double_precision() if double else nullcontext():
        loader, trainer = open_loader(cfg), Trainer(replace(cfg, num_steps=NUM_STEPS), out)
        for step in range(NUM_STEPS):
            batch = next(loader)
            if double:
                is_packed = isinstance(batch, PackedBatch)
                batch = in_double(batch) if is_packed else in_dtype(batch, True)
            metrics = trainer.train_step(batch, monitor=step == 1)
            found |= {f"{k} {step}": v.clone() for k, v in metrics.items() if "loss/" in k}
        state = trainer.objective.state_dict()
        found |= {f"state/{name}": value.clone() for name, value in state.items()}
        assert trainer.train_step.samples_taken == loader.samples
        trainer.close()
        loader.close()
    return found


def with_branches(cfg: TrainConfig) -> TrainConfig:
    vision = replace(cfg.vision, drop_path_rate=0.5, drop_path_mode="mask")
    return replace(cfg, vision=vision)


def recomputed(cfg: TrainConfig) -> TrainConfig:
    return replace(cfg, vision=replace(cfg.vision, activation_checkpointing="full"))


def balanced(cfg: TrainConfig) -> TrainConfig:
    balance = BalanceConfig(mode="gradient_norm", every=2)
    return replace(cfg, objective=replace(cfg.objective, balance=balance))


CASES: list[tuple[str, Callable[[TrainConfig], TrainConfig]]] = [
    *((name, lambda cfg: cfg) for name in ("supervised", "clip", "simclr", "dino")),
    *(("dino", change) for change in (with_branches, recomputed)),
    ("slip", balanced),
]


@pytest.mark.parametrize("name, change", CASES)
def test_squares_train_as_squares(
    name: str, change: Callable[[TrainConfig], TrainConfig], dataset: Path, tmp_path: Path
) -> None:
    squares, packed = of_squares(change(packed_run(dataset, name)), 8)
    expected = trained(squares, tmp_path / "squares", double=True)
    got = trained(packed, tmp_path / "packed", double=True)
    assert got.keys() == expected.keys()
    # The gradient by a mean of 16 tokens is 4 times as long as those by the tokens, of all terms.
    scale = {"state/balance.norm": 4.0}
    for key, value in expected.items():
        value = value * scale[key] if key in scale else value
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10, msg=key)


def test_squares_train_as_squares_in_single_precision(dataset: Path, tmp_path: Path) -> None:
    squares, packed = of_squares(packed_run(dataset, "dino"), 8)
    expected = trained(squares, tmp_path / "squares", double=False)
    got = trained(packed, tmp_path / "packed", double=False)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=key)


def test_a_frozen_run_teaches_views_of_any_shape(dataset: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    Trainer(replace(packed_run(dataset, "supervised"), num_steps=1), teacher).train()
    cfg = packed_run(dataset, "global_distillation")
    cfg = replace(cfg, objective=replace(cfg.objective, teacher=str(teacher)))
    squares, packed = of_squares(cfg, 8)
    expected = trained(squares, tmp_path / "squares", double=False)
    got = trained(packed, tmp_path / "packed", double=False)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=key)
    assert trace(cfg, bf16=False, cuda=False).held
    assert step_flops(cfg)["target encoder"].forward > 0


def test_a_run_logs_what_its_batches_held(dataset: Path, tmp_path: Path) -> None:
    cfg = packed_run(dataset, "clip", evaluate_every=6, evaluate_pictures=8)
    assert Trainer(cfg, tmp_path / "run").train().step == 6
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss/total" in row]
    loader = open_loader(cfg)
    batches = [next(loader) for _ in range(6)]
    for row, own in zip(rows, (batches[:3], batches[3:]), strict=True):
        assert row["batch/images"] == sum(batch.batch_size for batch in own) / 3
        tokens = sum(int(batch.grids.prod(2).sum()) for batch in own) / 3
        assert row["batch/tokens"] == tokens
        rate = row["throughput/tokens_s"] / row["throughput/img_s"]
        assert rate == pytest.approx(row["batch/tokens"] / row["batch/images"])
        lengths = tuple(Counter(n for b in own for n in b.lengths(view)) for view in range(2))
        pictures = PackedPictures(
            num_steps=3, num_samples=sum(b.batch_size for b in own), lengths=lengths
        )
        flops = without_sampling(step_flops(cfg, pictures=pictures)).model
        batches_s = row["throughput/img_s"] / row["batch/images"]
        assert row["efficiency/tflop_s"] == pytest.approx(flops * batches_s / 1e12, rel=1e-6)
    assert rows[0]["batch/images"] != rows[1]["batch/images"]


def test_batches_of_another_step_are_refused(dataset: Path) -> None:
    batch = next(open_loader(packed_run(dataset, "supervised")))
    halves = split(batch, [3, batch.batch_size - 3])
    assert step_counts(halves, 1) == step_counts(halves[:1], 2) == [3, batch.batch_size - 3]
    with pytest.raises(ValueError, match="expected those of a step of 2 batches.*got 1 on each of"):
        step_counts(halves[:1], 1)
    alone = replace(batch, step_counts=())
    assert step_counts([alone], 1) == [batch.batch_size]
    with pytest.raises(ValueError, match="expected step_counts of each batch"):
        step_counts([alone], 2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_whole_run(accumulate: int, dataset: Path, tmp_path: Path) -> None:
    parallel = ParallelConfig(accumulate=accumulate)
    cfg = packed_run(dataset, "supervised", checkpoint_every=3, log_every=1, parallel=parallel)
    cfg = with_branches(cfg)
    Trainer(cfg, tmp_path / "whole").train()

    def end_at_five(step: int, values: dict[str, float]) -> None:
        if step == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Trainer(cfg, tmp_path / "parts").train(end_at_five)
    resumed = Trainer(cfg, tmp_path / "parts", resume=True)
    assert resumed.step == 3 and resumed.train_step.samples_taken == resumed.loader.samples > 0
    resumed.train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("name", ["simclr", "siameseim"])
def test_a_step_in_fp8_is_near_that_in_bf16(name: str, dataset: Path, tmp_path: Path) -> None:
    losses = {}
    for precision, backend in (("bf16", "torch"), ("fp8_current", "torchao")):
        cfg = packed_run(dataset, name, precision=precision, backend=backend, fp8_min_dim=1)
        Trainer(replace(cfg, num_steps=2, log_every=1), tmp_path / precision).train()
        rows = read_jsonl(tmp_path / precision / "metrics.jsonl")
        losses[precision] = torch.tensor([row["loss/total"] for row in rows])
    assert not torch.equal(*losses.values())  # FP8 rounds
    torch.testing.assert_close(*losses.values(), rtol=0.05, atol=0)


def test_a_resume_with_another_budget_has_to_be_typed(dataset: Path, tmp_path: Path) -> None:
    cfg = packed_run(dataset, "supervised")
    Trainer(replace(cfg, num_steps=1), tmp_path / "run").train()
    more = replace(cfg, num_steps=2, data=replace(cfg.data, max_tokens_per_batch=1000))
    with pytest.raises(ValueError, match=r"--data\.max-tokens-per-batch: a step took \d+ tokens"):
        Trainer(more, tmp_path / "run", resume=True, new_num_steps=True)
    options = {"resume": True, "new_num_steps": True, "new_batch_size": True}
    assert Trainer(more, tmp_path / "run", **options).train().step == 2
    squares = replace(cfg, data=of_squares(cfg, 8)[0].data)
    with pytest.raises(ValueError, match=r"data\.max_tokens_per_batch"):
        Trainer(squares, tmp_path / "run", **options)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"compile": True}, r"compile: expected False.*max_tokens_per_batch, got True"),
    ({"cuda_graphs": "step"}, r"cuda_graphs: expected none"),
    ({"precision": "fp8_current"}, r"precision: expected auto, fp32 or bf16"),
    ({"backend": "te"}, r"backend: expected auto or torch"),
    ({"parallel": ParallelConfig(chunk=4)}, r"parallel\.chunk: expected 0"),
    ({"objective": {"teacher_cache": "cache"}}, r"objective\.teacher_cache: expected none, since"),
    ({"data": {"max_tokens_per_batch": 40}}, r"expected at least 72.*got 40"),
    ({"data": {"max_tokens_per_batch": 0}}, r"size_range: expected none without"),
    ({"view": {"size_range": (12, 40)}}, r"multiples of vision\.patch_size = 8, got \(12, 40\)"),
    ({"view": {"size_range": (40, 16)}}, r"size_range: expected least <= most"),
    ({"vision": {"drop_path_rate": 0.1}}, r"vision\.drop_path_mode: expected mask"),
    ({"objective": {"teacher": "timm:vit_tiny_patch16_224"}}, r"objective\.teacher.*run directory"),
]


@pytest.mark.parametrize("changed, told", WRONG)
def test_what_needs_one_shape_is_refused(changed: dict[str, Any], told: str, dataset: Path) -> None:
    name = "global_distillation" if "objective" in changed else "clip"
    cfg = packed_run(dataset, name)

    def change() -> TrainConfig:
        ((field, value),) = changed.items()
        if field == "view":
            shown = replace(cfg.data.global_views, **value)
            return replace(cfg, data=replace(cfg.data, global_views=shown))
        if not isinstance(value, dict):
            return replace(cfg, **changed)
        vision = {"drop_path_mode": "subset"} if field == "vision" else {}
        return replace(cfg, **{field: replace(getattr(cfg, field), **vision, **value)})

    with pytest.raises(ValueError, match=told):
        change()


@pytest.mark.parametrize(
    "name, mode, told",
    [
        ("coca", "none", r"objective\.terms: expected no captioner .*'caption_tokens'"),
        ("densecl", "none", r"objective\.terms: expected no match of cells .*'cells'"),
        ("clip", "blend", r"objective\.mixing\.mode: expected joint, own_image, masked or none"),
    ],
)
def test_captioners_matches_and_blends_are_refused(
    name: str, mode: Any, told: str, dataset: Path
) -> None:
    cfg = shrink(demo_method(name), path=dataset, num_classes=9, text=TEXT)
    objective = replace(cfg.objective, mixing=replace(cfg.objective.mixing, mode=mode))
    data = replace(cfg.data, max_tokens_per_batch=4096)
    with pytest.raises(ValueError, match=told):
        replace(cfg, data=data, objective=objective)


def test_masks_need_two_patches_and_mixed_inputs_room_for_all_their_images(dataset: Path) -> None:
    cfg = packed_run(dataset, "m3i")
    shown = replace(cfg.data.global_views, size_range=(PATCH, 2 * PATCH))
    with pytest.raises(ValueError, match=r"size_range: expected at least 16, two patches"):
        replace(cfg, data=replace(cfg.data, global_views=shown))
    with pytest.raises(ValueError, match=r"at least 180, the patches that the views of the 2 sam"):
        replace(cfg, data=replace(cfg.data, max_tokens_per_batch=179))


def test_internimage_is_refused(dataset: Path) -> None:
    clip = packed_run(dataset, "clip")
    with pytest.raises(ValueError, match=r"vision: expected a ViT.*InternImageConfig"):
        replace(clip, vision=InternImageConfig(image_size=32))
