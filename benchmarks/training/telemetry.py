"""What logging and telemetry cost a training step: processor time, and steps with and without.

    m3i-fast bench telemetry [--recipe demo] [--rounds 10] [--no-record]

Windows of `log_every` steps on one batch in memory, in turn without and with: `with` adds every
step's metrics to the run's log, reads and writes a row at the end of its window and has the thread
that samples beside it, as a run does. Processor time is that of the threads themselves, which a
busy machine changes little: of the sampling thread a sample, of the log a step and a row, and of
all of it the share of a step's time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Device, publish, resolve
from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.benchmarks.core.rate_statistics import summarise_rates
from m3i_fast.config import TrainConfig
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.telemetry.sampler import TelemetrySampler
from m3i_fast.recipes import recipes

SUBJECT = "telemetry"
WITHOUT, WITH = "without", "with"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    recipe: str = "demo"
    """Whose step is timed, on noise."""
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    hz: float = 1.0
    """Samples a second."""
    rounds: int = 10
    """Windows without and with, each; one more of both goes before."""
    steps: int = 0
    """Of a window, at whose end a row is logged; 0: the recipe's log_every."""
    seconds: float = 10.0
    """That the sampling thread alone is watched for."""
    record: bool = True
    """Append the row to the ledger, benchmarks/results/telemetry.jsonl."""

    def __post_init__(self) -> None:
        if self.recipe not in recipes():
            raise ValueError(f"recipe: expected one of {', '.join(recipes())}, got {self.recipe}")
        if self.rounds < 1 or self.steps < 0 or not self.seconds > 0:
            raise ValueError(
                "rounds, steps, seconds: expected >= 1, >= 0 and > 0, got "
                f"{self.rounds}, {self.steps} and {self.seconds}"
            )


@dataclass(slots=True)
class Cpu:
    """The processor seconds that calls took, and the number of calls."""

    seconds: float = 0.0
    calls: int = 0
    per: float = field(default=0.0, init=False)

    def of(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.thread_time()
        result = function(*arguments)
        self.seconds += time.thread_time() - begun
        self.calls += 1
        self.per = self.seconds / self.calls
        return result


def main(argv: list[str] | None = None) -> None:
    config = read_command(Config, SUBJECT, argv)
    publish(SUBJECT, rows_of(config), table, record=config.record)


def train_config(config: Config) -> TrainConfig:
    """Return the recipe, long enough, with the telemetry of one arm."""
    cfg = recipes()[config.recipe]()
    steps = config.steps or cfg.log_every
    return replace(
        cfg,
        num_steps=max(cfg.num_steps, (2 * config.rounds + 3) * steps),
        log_every=steps,
        telemetry=TelemetryConfig(hz=config.hz),
        device="cuda" if resolve(config.device) == "cuda" else "cpu",
    )


def rows_of(config: Config) -> Iterator[dict[str, Any]]:
    cfg = train_config(config)
    sample_s = cpu_of_a_sample(config)
    with tempfile.TemporaryDirectory() as folder:
        data = Repeated(draw_batch(cfg).to(torch.device(cfg.device)))
        trainer = Trainer(cfg, Path(folder) / "run", data=data)
        try:
            step_s = timed_steps(trainer, config.rounds)
            add, row = cpu_of_the_log(trainer)
        finally:
            trainer.close()
    yield {"config": cfg, **figures_of(config, cfg, sample_s, step_s, add, row)}


def cpu_of_a_sample(config: Config) -> float:
    """Return the processor seconds of the sampling thread, its start included."""
    with TelemetrySampler(config.hz) as telemetry:
        begun = time.monotonic()
        time.sleep(config.seconds)
        ended = time.monotonic()
    return telemetry.cpu_s / max(telemetry.summary(begun - 1, ended + 1)["num_samples"], 1)


def timed_steps(trainer: Trainer, rounds: int) -> dict[str, list[float]]:
    """Return seconds a step of each window; the first of each kind only warms up."""
    taken_s: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    for number in range(rounds + 1):
        order = (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT)
        for kind in order:
            seconds = _window(trainer, logs=kind == WITH)
            if number:
                taken_s[kind].append(seconds)
    return taken_s


def _window(trainer: Trainer, *, logs: bool) -> float:
    num_steps, log = trainer.cfg.log_every, trainer.log
    if logs:
        log.open(trainer.step)
    _wait(trainer)
    begun = time.perf_counter()
    for _ in range(num_steps):
        metrics = trainer.train_step(next(trainer.loader))
        if logs:
            log.add(metrics, trainer.guard.skip)
    if logs:
        log.write(trainer.step, log.read(trainer.step))
    _wait(trainer)
    seconds = time.perf_counter() - begun
    log.timer.read()  # or a window without a log would leave its times to the next
    log.close()
    return seconds / num_steps


def cpu_of_the_log(trainer: Trainer) -> tuple[Cpu, Cpu]:
    """Return the processor seconds of a window's steps and of its logged row, in this thread."""
    add, row, log = Cpu(), Cpu(), trainer.log
    log.open(trainer.step)
    for _ in range(trainer.cfg.log_every):
        metrics = trainer.train_step(next(trainer.loader))
        add.of(log.add, metrics, trainer.guard.skip)
    _wait(trainer)  # which the read would do, and a processor that waits is busy
    row.of(lambda: log.write(trainer.step, log.read(trainer.step)))
    log.close()
    return add, row


def _wait(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def figures_of(
    config: Config,
    cfg: TrainConfig,
    sample_s: float,
    step_s: dict[str, list[float]],
    add: Cpu,
    row: Cpu,
) -> dict[str, Any]:
    steps = cfg.log_every
    log_s = add.per + row.per / steps
    times = {name: summarise_rates([1e3 * s for s in values]) for name, values in step_s.items()}
    ratios = [b / a for a, b in zip(step_s[WITHOUT], step_s[WITH], strict=True)]
    median_s = times[WITHOUT].median / 1e3
    return {
        "recipe": config.recipe,
        "device": cfg.device,
        "num_threads": torch.get_num_threads(),
        "batch_size": cfg.data.batch_size,
        "hz": config.hz,
        "log_every": steps,
        "step_ms": {name: asdict(rates) for name, rates in times.items()},
        "ratio": asdict(summarise_rates(ratios)),
        "cpu": {
            "sample_ms": 1e3 * sample_s,
            "thread_share": config.hz * sample_s,
            "add_ms": 1e3 * add.per,
            "row_ms": 1e3 * row.per,
            "log_share": log_s / median_s,
            "share_of_a_step": config.hz * sample_s + log_s / median_s,
        },
    }


def table(rows: list[dict[str, Any]]) -> Table:
    (row,) = rows
    cpu, ratio = row["cpu"], row["ratio"]
    title = f"{SUBJECT}: {row['recipe']} on {row['device']}, a row every {row['log_every']} steps"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "value"):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    lines = {
        "processor time, of a step's": f"{cpu['share_of_a_step']:.2%}",
        f"  sampling, {row['hz']:g} a second": f"{cpu['thread_share']:.2%} of a core",
        "  a sample": f"{cpu['sample_ms']:.2f} ms",
        "  the log, of a step's": f"{cpu['log_share']:.2%}",
        "  a step's metrics added": f"{cpu['add_ms']:.3f} ms",
        "  a row read and written": f"{cpu['row_ms']:.2f} ms",
        "a step with, beside without": (
            f"{ratio['median']:.4f} ({ratio['ci_low']:.4f} - {ratio['ci_high']:.4f})"
        ),
    }
    for name, rates in row["step_ms"].items():
        lines[f"  {name}, ms"] = f"{rates['median']:.1f} ({rates['p5']:.1f} - {rates['p95']:.1f})"
    for name, value in lines.items():
        shown.add_row(name, value)
    return shown
