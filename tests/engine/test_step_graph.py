"""The whole step as one graph: the losses, weights and records of steps without one, bit for bit.

Without a GPU a stand-in captures: it holds the operators of a step and calls them again, on the
tensors of the capture, so that what would be baked into a graph is baked into it. The real capture
is tested on the null CUDA runtime (`tests/null_cuda/contract_step_graph.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import TrainConfig
from m3i_fast.config.guard import GuardConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.optim import EmaConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine import step_graph
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.run.gpu_errors import lighter
from m3i_fast.engine.step_graph import StepResult, Work
from m3i_fast.engine.train_step import TrainStep, build_train_step
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import recipes, shrink
from tests.shared.engine.small_run import TEXT, assert_same_run, small_run

CPU = torch.device("cpu")
FP32 = Arithmetic(recipe="fp32", backend="torch", compute_dtype=torch.float32)
BF16 = Arithmetic(recipe="bf16", backend="torch", compute_dtype=torch.bfloat16)
NUM_STEPS = 8


class Operators(TorchDispatchMode):
    """Keeps every operator that is called, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Other tensors of the same memory: the step may give its own ones another shape.
        own, named = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, own, named, tree_map_only(Tensor, Tensor.detach, out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Call all of them again, and write what they return over what they returned."""
        self.num_replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stand:
    """`Recorder` without a GPU. A capture must not run: what it changed is put back."""

    def __init__(self) -> None:
        self.graphs: list[Operators] = []
        self.num_warm = 0
        self.kept: Callable[[], list[Tensor]]

    def warm_up(self, work: Work) -> StepResult:
        self.num_warm += 1
        result, packed = work()
        return result.unpacked(packed)

    def capture(self, work: Work) -> tuple[Operators, StepResult, Tensor]:
        graph, kept = Operators(), self.kept()
        before = [tensor.detach().clone() for tensor in kept]
        with graph:
            result, packed = work()
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
        self.graphs.append(graph)
        return graph, result, packed

    @property
    def num_replays(self) -> int:
        return sum(graph.num_replays for graph in self.graphs)


def config(recipe: str = "demo", **changes: Any) -> TrainConfig:
    """A small model whose learning rate, weight decay and momentum change in every step."""
    cfg = shrink(recipes()[recipe](), path=Path("unread"), num_classes=10, text=TEXT)
    cfg = replace(
        cfg,
        data=replace(cfg.data, batch_size=8),
        num_steps=NUM_STEPS,
        log_every=4,
        optim=replace(cfg.optim, final_weight_decay=0.4, warmup_fraction=0.3),
        ema=EmaConfig(momentum=0.9, final_momentum=1.0),
        cuda_graphs="step",
    )
    return replace(cfg, **changes)


def state_of(step: TrainStep) -> dict[str, Tensor]:
    """All that a step updates and a checkpoint or the guard keeps."""
    spikes = {"guard": step.guard._spikes._state}
    return tensors_of(step.objective, step.optimizer) | spikes


def kept_by(step: TrainStep) -> Callable[[], list[Tensor]]:
    """What a step changes of what was there before it."""
    return lambda: [*state_of(step).values(), *step.objective.buffers()]


def build(cfg: TrainConfig, arithmetic: Arithmetic = FP32) -> tuple[TrainStep, Stand]:
    stand = Stand()
    step = build_train_step(cfg, World(CPU), arithmetic, recorder=stand)
    stand.kept = kept_by(step)
    return step, stand


def batch_of(cfg: TrainConfig, step: int) -> Batch:
    """Another batch for each step, as far along the run."""
    batch = draw_batch(cfg)
    noise = torch.Generator().manual_seed(step)
    size = batch.batch_size
    return replace(
        batch,
        global_views=tuple(
            torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=noise)
            for view in batch.global_views
        ),
        label=torch.randint(-1, 10, (size,), generator=noise),
        position=batch.position + size * step,
    )


def take(
    step: TrainStep,
    *,
    monitored: tuple[int, ...] = (),
    before: Callable[[int], Any] = lambda _: None,
) -> list[dict[str, float]]:
    """Take all steps; return their metrics, read at the end as a run does."""
    found = []
    for index in range(NUM_STEPS):
        batches = [
            batch_of(step.cfg, index * step.cfg.parallel.accumulate + part)
            for part in range(step.cfg.parallel.accumulate)
        ]
        undo = before(index)
        found.append(step(*batches, monitor=index in monitored))
        if undo is not None:
            undo()
    return [{name: float(value) for name, value in metrics.items()} for metrics in found]


def taken_without(
    cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch, arithmetic: Arithmetic = FP32, **options: Any
) -> tuple[TrainStep, list[dict[str, float]]]:
    """The same steps, none of which is captured."""
    with monkeypatch.context() as patch:
        patch.setattr(step_graph, "NUM_WARMUP", NUM_STEPS)
        step, stand = build(cfg, arithmetic)
        metrics = take(step, **options)
    assert not stand.graphs
    return step, metrics


def expect_equal(ours: TrainStep, other: TrainStep) -> None:
    mine, theirs = state_of(ours), state_of(other)
    assert mine.keys() == theirs.keys()
    wrong = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not wrong
    assert ours.guard.drain() == other.guard.drain()


@pytest.mark.parametrize(
    ("recipe", "arithmetic"),
    [
        ("demo", FP32),
        ("demo", BF16),
        ("demo_dino", FP32),
        ("demo_moco_v3", FP32),
        ("demo_cappa", FP32),
    ],
)
def test_replayed_steps_are_those_without_a_graph(
    recipe: str, arithmetic: Arithmetic, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(recipe, guard=GuardConfig(spikes="skip", spike_window=2))
    step, stand = build(cfg, arithmetic)
    metrics = take(step)
    assert (stand.num_warm, len(stand.graphs), stand.num_replays) == (1, 1, NUM_STEPS - 1)
    other, expected = taken_without(cfg, monkeypatch, arithmetic)
    assert metrics == expected
    assert len({found["loss/total"] for found in metrics}) == NUM_STEPS
    expect_equal(step, other)


def test_steps_by_schedules_on_the_device_are_those_by_numbers() -> None:
    """Numbers of the host are rounded to fp32 on their way; and weights decay apart."""
    cfg = config()
    step, _ = build(cfg)
    plain = build_train_step(replace(cfg, cuda_graphs="none"), World(CPU), FP32)
    for ours, expected in zip(take(step), take(plain), strict=True):
        assert ours.keys() == expected.keys()
        assert ours == pytest.approx(expected, rel=2e-4)
    rates = [float(group["lr"]) for group in step.optimizer.param_groups]
    assert rates == pytest.approx([group["lr"] for group in plain.optimizer.param_groups])


def test_batches_that_are_added_up_are_captured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("demo_supervised", parallel=ParallelConfig(accumulate=2))
    step, stand = build(cfg)
    metrics = take(step)
    assert stand.num_replays == NUM_STEPS - 1
    other, expected = taken_without(cfg, monkeypatch)
    assert metrics == expected
    expect_equal(step, other)


def test_monitored_and_measured_steps_are_taken_without_the_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config()
    balance = BalanceConfig(mode="gradient_norm", every=4)
    cfg = replace(cfg, objective=replace(cfg.objective, balance=balance))
    step, stand = build(cfg)
    metrics = take(step, monitored=(3, 7))
    assert stand.num_replays == NUM_STEPS - 5  # 0 and 4 are measured, 1 warms up
    assert "monitor/target_rank" in metrics[3] and "monitor/target_rank" not in metrics[2]
    other, expected = taken_without(cfg, monkeypatch, monitored=(3, 7))
    assert metrics == expected
    expect_equal(step, other)


def test_a_skipped_replay_changes_nothing_and_the_next_goes_on() -> None:
    """A weight of the text encoder is not a number in one step."""
    cfg = config()

    def spoilt(step: TrainStep) -> Callable[[int], Any]:
        weight = next(step.objective.terms["caption"].text_encoder.parameters())  # type: ignore[union-attr]

        def before(index: int) -> Callable[[], None] | None:
            if index != 5:
                return None
            kept, state = (
                weight.detach().clone(),
                {name: tensor.clone() for name, tensor in state_of(step).items()},
            )
            weight.data.view(-1)[0] = math.nan

            def after() -> None:
                assert float(step.guard.skip) == 1
                weight.data.copy_(kept)
                assert all(torch.equal(state[n], t) for n, t in state_of(step).items())

            return after

        return before

    step, stand = build(cfg)
    metrics = take(step, monitored=(3,), before=spoilt(step))
    assert stand.num_replays == NUM_STEPS - 2
    assert [math.isfinite(found["loss/total"]) for found in metrics] == [
        index != 5 for index in range(NUM_STEPS)
    ]
    steps, records = step.guard.drain()
    assert [skipped for _, skipped in steps] == [index == 5 for index in range(NUM_STEPS)]
    (record,) = records
    assert record["reason"] == "not finite" and not math.isfinite(record["losses"]["loss/caption"])
    assert record["sample_ids"] == batch_of(cfg, 5).sample_id.tolist()


def test_a_batch_of_another_size_is_taken_without_the_graph_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = config()
    step, stand = build(cfg)
    half = replace(cfg, data=replace(cfg.data, batch_size=4))
    with caplog.at_level(logging.WARNING):
        for index in range(NUM_STEPS):
            step(batch_of(half if index in (3, 5) else cfg, index))
    assert stand.num_replays == NUM_STEPS - 3 and len(stand.graphs) == 1
    (told,) = caplog.messages
    assert told.startswith("cuda_graphs step: expected the shapes of the first step, ((8, 3,")
    assert "got ((4, 3," in told


def test_after_a_reset_the_step_is_captured_on_the_new_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a rollback, whose moments are other tensors."""

    def before(index: int) -> None:
        if index == 4:
            state = step.optimizer.state
            for p, fields in list(state.items()):
                state[p] = {name: value.clone() for name, value in fields.items()}
            assert step.graph is not None
            step.graph.reset()

    cfg = config()
    step, stand = build(cfg)
    metrics = take(step, before=before)
    assert (len(stand.graphs), stand.num_replays) == (2, NUM_STEPS - 2)
    assert all(isinstance(fields, dict) for fields in step.optimizer.state.values())
    other, expected = taken_without(cfg, monkeypatch)
    assert metrics == expected
    expect_equal(step, other)


def run_with_a_rollback(cfg: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Train to the end; the sixth step, which has monitors, is a spike the first time."""
    stand, spikes = Stand(), [1e3]
    with monkeypatch.context() as patch:
        build = partial(build_train_step, recorder=stand)
        patch.setattr("m3i_fast.engine.trainer.build_train_step", build)
        trainer = Trainer(cfg, out)
    stand.kept = kept_by(trainer.train_step)
    model: Any = trainer.train_step.model
    forward = model.forward

    def spoilt(*arguments: Any, monitor: bool, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = forward(*arguments, monitor=monitor, **options)
        if monitor and trainer.step == 5 and spikes:
            metrics["loss/total"] = metrics["loss/total"] * spikes.pop()
        return loss, metrics

    model.forward = spoilt
    assert trainer.train().step == cfg.num_steps
    return stand


def test_a_run_that_rolls_back_is_that_without_a_graph(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = small_run(
        dataset,
        num_steps=9,
        log_every=3,
        checkpoint_every=2,
        cuda_graphs="step",
        guard=GuardConfig(spikes="rollback", spike_window=2, spike_deviations=50.0),
    )
    stand = run_with_a_rollback(cfg, tmp_path / "replayed", monkeypatch)
    assert "ROLLED BACK to step 4, from step 6, for the spike at step 5" in caplog.text
    # Steps 0 and 4, after the rollback, warm up; 2, 5 and 8 have monitors.
    assert (stand.num_warm, [graph.num_replays for graph in stand.graphs]) == (2, [3, 2])
    monkeypatch.setattr(step_graph, "NUM_WARMUP", cfg.num_steps)
    assert not run_with_a_rollback(cfg, tmp_path / "launched", monkeypatch).graphs
    assert_same_run(tmp_path / "replayed", tmp_path / "launched")
    rows = read_jsonl(tmp_path / "replayed" / "metrics.jsonl")
    assert rows[0]["time/replay_ms"] > 0 and rows[-1]["time/replay_ms"] > 0


def test_what_a_graph_of_the_step_cannot_hold_is_refused(tmp_path: Path) -> None:
    cfg = config()
    vision, objective, optim = cfg.vision, cfg.objective, cfg.optim
    adamw = replace(optim, matrices="adamw")
    masked = replace(objective.mixing, mode="masked", mask_ratio=0.5, final_mask_ratio=0.75)
    measured = replace(objective, balance=BalanceConfig(mode="gradient_norm", every=1))
    for changes, reason in (
        ({"compile": True}, "compile: expected False with cuda_graphs = step"),
        ({"precision": "fp8_current"}, "precision: expected auto, fp32 or bf16"),
        ({"optim": adamw, "parallel": ParallelConfig(shard=-1)}, "parallel.shard: expected 1"),
        ({"parallel": ParallelConfig(chunk=2)}, "parallel.chunk: expected 0"),
        ({"vision": replace(vision, activation_checkpointing="full")}, "got full and none"),
        ({"optim": replace(adamw, name="lamb")}, "optim.name: expected adamw"),
        ({"optim": replace(adamw, impl="te")}, "optim.impl: expected auto or torch .*, got te"),
        ({"log_every": 1}, "log_every: expected 2 or more"),
        ({"objective": measured}, "objective.balance.every: expected 2 or more"),
        ({"objective": replace(objective, mixing=masked)}, "expected mask_ratio = 0.5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            replace(cfg, **changes)
    with pytest.raises(ValueError, match="expected one GPU with step, got 2 ranks"):
        build_train_step(cfg, World(CPU, rank=1, size=2), FP32)
    with pytest.raises(ValueError, match="expected a GPU, got cpu; set --cuda-graphs none"):
        build_train_step(cfg, World(CPU), FP32)
    assert any("--cuda-graphs none" in way for way in lighter(cfg))


def test_configs_of_before_the_step_could_be_captured_are_read(tmp_path: Path) -> None:
    for before, now in (("false", "none"), ("true", "modules")):
        text = config(cuda_graphs="modules").to_json()
        assert text.count('"cuda_graphs": "modules"') == 1
        path = tmp_path / "config.json"
        path.write_text(text.replace('"cuda_graphs": "modules"', f'"cuda_graphs": {before}'))
        assert TrainConfig.load(path).cuda_graphs == now


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu_is_that_without_a_graph(
    precision: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = small_run(
        dataset, num_steps=12, log_every=4, device="cuda", precision=precision, cuda_graphs="step"
    )
    found: list[list[float]] = []
    for num_warmup in (step_graph.NUM_WARMUP, cfg.num_steps):
        monkeypatch.setattr(step_graph, "NUM_WARMUP", num_warmup)
        out = tmp_path / str(num_warmup)
        Trainer(cfg, out).train()
        found.append([row["loss/total"] for row in read_jsonl(out / "metrics.jsonl")])
    # Sums by atomic additions have no order.
    assert found[0] == pytest.approx(found[1], rel=1e-2 if precision == "bf16" else 1e-3)
