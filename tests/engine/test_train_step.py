"""The step that trains is the one that is timed, profiled and planned; a call is one whole step."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.benchmarks.core.timed_windows import Schedule
from m3i_fast.benchmarks.node.main import measure_node
from m3i_fast.benchmarks.scaling import ranks as scaling_ranks
from m3i_fast.benchmarks.training import step as bench_step
from m3i_fast.benchmarks.training import telemetry as bench_telemetry
from m3i_fast.config import TrainConfig
from m3i_fast.engine.optim.schedules import lr_schedule
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.train_step import ForwardPass, TrainStep, build_train_step
from m3i_fast.engine.trainer import Trainer
from m3i_fast.planning.step_budget import step_seconds
from m3i_fast.planning.step_memory import trace
from m3i_fast.profiling.capture import NoProfiler, Windows, profile_steps
from tests.shared.engine.real_step import FP32
from tests.shared.engine.small_run import small_run
from tests.shared.source_files import FILES


class BrokenStepError(Exception):
    """What a call of the step raises in these tests."""


def _train(cfg: TrainConfig, out: Path) -> None:
    Trainer(cfg, out).train()


def _profile(cfg: TrainConfig, out: Path) -> None:
    trainer = Trainer(cfg, out)
    try:
        profile_steps(trainer, NoProfiler(), Windows(warmup=1, steps=1))
    finally:
        trainer.close()


def _node(cfg: TrainConfig, out: Path) -> None:
    schedule = Schedule(num_windows=3, window_s=0.01, warmup_steps=1, max_warmup_s=0.0)
    measure_node(cfg, schedule, make_data=False)


def _scaling(cfg: TrainConfig, out: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(cfg, out, data=Repeated(draw_batch(cfg)))
        scaling_ranks._window(trainer, "together", 1)
    finally:
        dist.destroy_process_group()


def _telemetry(cfg: TrainConfig, out: Path) -> None:
    bench_telemetry.timed_steps(Trainer(cfg, out, data=Repeated(draw_batch(cfg))), 1)


ASKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

CALLERS: dict[str, Callable[[TrainConfig, Path], object]] = {
    "trainer": _train,
    "profile": _profile,
    "plan": lambda cfg, _: trace(cfg, bf16=False),
    "calibration": lambda cfg, _: step_seconds(cfg),
    "bench step": lambda *_: bench_step.main(
        "--device cpu --batch-size 6 --dim 64 --depth 1 --num-samples 2 --no-record".split()
    ),
    "bench node": _node,
    "bench scaling": _scaling,
    "bench telemetry": _telemetry,
}


@pytest.mark.parametrize("caller", CALLERS)
def test_a_broken_step_breaks_whatever_takes_steps(
    caller: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TrainStep, *batches: object, monitor: bool = False) -> dict[str, Tensor]:
        raise BrokenStepError

    monkeypatch.setattr(TrainStep, "__call__", broken)
    with pytest.raises(BrokenStepError):
        CALLERS[caller](small_run(dataset), tmp_path / "run")


# What a step is put together from, and where each is defined.
PARTS = {
    "encode_targets": "m3i_fast/objectives/objective.py",
    "encode_inputs": "m3i_fast/objectives/objective.py",
    "finish_step": "m3i_fast/objectives/objective.py",
    "set_schedules": "m3i_fast/engine/optim/optimizers.py",
    "clip_grad_norm": "m3i_fast/engine/optim/optimizers.py",
    "update_ema": "m3i_fast/engine/optim/ema.py",
}
PLAIN = "benchmarks/training/step.py"  # the peer that is written plainly
# Trains a classifier, without objective, guard or averages, by the same optimisers and schedules.
CLASSIFIER = {"set_schedules": {"m3i_fast/engine/fine_tuning.py"}}


def test_no_other_file_puts_a_step_together() -> None:
    called_in: dict[str, set[str]] = {name: set() for name in PARTS}
    for file, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            function = node.func if isinstance(node, ast.Call) else None
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in PARTS and file not in (PLAIN, PARTS[name]):
                called_in[name].add(file)
    ours = {"m3i_fast/engine/train_step.py"}
    assert called_in == {name: ours | CLASSIFIER.get(name, set()) for name in PARTS}


def test_a_step_counts_itself_and_leaves_no_gradient(dataset: Path) -> None:
    cfg = small_run(dataset)
    step = build_train_step(cfg, World(torch.device("cpu")), FP32)
    before = {name: p.detach().clone() for name, p in step.objective.named_parameters()}
    metrics = step(draw_batch(cfg))
    assert step.steps_taken == 1 and float(step.guard.skip) == 0
    assert all(value.ndim == 0 for value in metrics.values())
    assert {"loss/total", "optim/grad_norm"} <= metrics.keys()
    assert not any(name.startswith("monitor/") for name in metrics)
    assert all(p.grad is None for p in step.objective.parameters())
    trained = [n for n, p in step.objective.named_parameters() if p.requires_grad]
    assert any(not torch.equal(step.objective.get_parameter(n), before[n]) for n in trained)
    assert any(name.startswith("monitor/") for name in step(draw_batch(cfg), monitor=True))


def test_a_step_asks_for_no_value(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host would wait for it; first contact counts the waits of every kind.

    The mix is drawn on the host, and the objective checks values that it finds on a CPU.
    """
    step = build_train_step(small_run(dataset), World(torch.device("cpu")), FP32)
    batch = draw_batch(step.cfg)
    step(batch)
    mix = step.draw_mix(batch)
    monkeypatch.setattr(step, "draw_mix", lambda _: mix)
    asked: list[str] = []

    class ValuesAsked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            files = [frame.filename for frame in traceback.extract_stack()]
            (*_, file) = (file for file in files if "/m3i_fast/" in file)
            if func in ASKS and "/m3i_fast/engine/" in file:
                asked.append(file)
            return func(*args, **(kwargs or {}))

    with ValuesAsked():
        step(batch)
    assert not asked


def test_the_learning_rate_is_the_schedules_times_the_back_off(dataset: Path) -> None:
    cfg = small_run(dataset)
    world = World(torch.device("cpu"))
    step = build_train_step(cfg, world, FP32, lr_scale=lambda index: 0.5 if index == 2 else 1.0)
    expected = lr_schedule(cfg.optim, cfg.num_steps)
    rates = []
    for _ in range(3):
        step(draw_batch(cfg))
        rates.append(min(group["lr"] for group in step.optimizer.param_groups))
    assert [step.lr_at(index) for index in range(3)] == [
        expected[0],
        expected[1],
        0.5 * expected[2],
    ]
    assert rates == [step.lr_at(index) for index in range(3)]


def test_a_batch_is_mixed_by_its_positions_whatever_the_rank(dataset: Path) -> None:
    cfg = small_run(dataset)
    mixing = replace(cfg.objective.mixing, num_queries=4)
    cfg = replace(cfg, objective=replace(cfg.objective, mixing=mixing))
    step = build_train_step(cfg, World(torch.device("cpu")), FP32)
    batch = draw_batch(cfg)
    later = replace(batch, position=batch.position + batch.batch_size)
    first, again, second = (step.draw_mix(each) for each in (batch, batch, later))
    drawn = ("token_index", "own_query", "other_query", "token_priority")
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in drawn)
    assert not any(torch.equal(getattr(first, name), getattr(second, name)) for name in drawn)
    other = build_train_step(
        replace(cfg, num_steps=30), World(torch.device("cpu"), rank=1, size=2), FP32
    ).draw_mix(batch)
    assert all(torch.equal(getattr(first, name), getattr(other, name)) for name in drawn)


def test_a_step_takes_the_samples_of_all_ranks(dataset: Path) -> None:
    cfg = small_run(dataset)
    step = build_train_step(cfg, World(torch.device("cpu"), rank=1, size=2), FP32)
    batch = draw_batch(cfg)
    step.model = ForwardPass(step.objective)  # there is no other rank to reduce with
    step(batch)
    assert step.samples_taken == 2 * batch.batch_size
