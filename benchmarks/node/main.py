"""Images a second of a node, what bounds them, and the settings that are fastest.

    m3i-fast bench node RECIPE [--windows 5] [--window-seconds 5] [--synthetic-data]
                               [--field value ...] [--sweep batch precision=bf16,fp32 ...]
    m3i-fast launch --nproc-per-node 8 bench node RECIPE ...

Three things take turns in one process a GPU: the loader alone, training on batches that lie in
memory, and both together, by the trainer's own steps; with several ranks also training that does
not exchange gradients. Warm-up and compilation are not counted, and nothing is waited for but at
the edges of a window. Left out of a step are its checkpoints, monitors and the reads of the log.
Images are source images: several views of a picture are one. `--sweep` measures every combination
in a fresh process; `node_sweep` says what can be swept.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from m3i_fast.benchmarks.core.command import read_recipe_command
from m3i_fast.benchmarks.core.efficiency import efficiency_figures
from m3i_fast.benchmarks.core.timed_windows import Schedule, Series, TimedWork, measure_windows
from m3i_fast.benchmarks.ledger.rows import append_row
from m3i_fast.benchmarks.node.bottleneck import verdict
from m3i_fast.benchmarks.node.figures import find, joules_per_image, summarise_ranks
from m3i_fast.benchmarks.node.planned import cores_of_node, planned
from m3i_fast.benchmarks.node.shards import PLACE, describe, shards_of, shared_folder
from m3i_fast.benchmarks.node.sweep import parse_sweep, sweep
from m3i_fast.benchmarks.node.table import show, show_sweep
from m3i_fast.benchmarks.node.workloads import BOTH, LOADER, TrainWork, works_of
from m3i_fast.config import TrainConfig
from m3i_fast.costs.traffic import Nodes
from m3i_fast.engine.parallel.ranks import World, join_world, leave_world
from m3i_fast.engine.precision.arithmetic import resolve_device
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.telemetry.sampler import TelemetrySampler, cuda_devices
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.threads import allowed_cores
from m3i_fast.recipes import recipes
from m3i_fast.terminal import make_console

SUBJECT = "node"
USAGE = """\
usage: m3i-fast bench node RECIPE [--synthetic-data] [--windows N] [--window-seconds S]
                                  [--sweep AXIS[=VALUE,VALUE] ...] [--field value ...]
       m3i-fast bench node --config FILE [...]
"""


@dataclass(frozen=True, kw_only=True)
class NodeCommand:
    """Images a second of a node, what bounds them, and the settings that are fastest."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    recipe: Annotated[str, tyro.conf.Suppress] = ""
    windows: int = 5
    """Windows of each measurement; at least 3."""
    window_seconds: float = 5.0
    """A window has as many steps as fill it."""
    warmup_steps: int = 10
    """Steps of each before its first window at least; then until they take about the same time."""
    max_warmup_seconds: float = 60.0
    """Windows begin after so long, whether steps have settled or not; the row says which."""
    synthetic_data: bool = False
    """Make JPEGs of 375 x 500 pixels for this run alone, instead of --data.path; classes and
    vocabulary are then theirs."""
    sweep: tuple[str, ...] = ()
    """Every combination of: batch, precision, loader-threads, hw-decoder-load; each with its usual
    values, or with those after =, as batch=64,128."""
    ranks: int = 1
    """Of --sweep: processes of each point, one a GPU."""
    json: Path | None = None
    """Write the figures there, too."""
    record: bool = True
    """Append a row to the ledger, benchmarks/results/node.jsonl."""

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            num_windows=self.windows,
            window_s=self.window_seconds,
            warmup_steps=self.warmup_steps,
            max_warmup_s=self.max_warmup_seconds,
        )


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        told = f"{USAGE}\nrecipes: {', '.join(recipes())}"
        make_console().print(told, highlight=False, soft_wrap=True)
        return
    command = read_recipe_command(
        SUBJECT, arguments, lambda name, config: NodeCommand(config=config, recipe=name)
    )
    _expect_measurable(command)
    (_sweep if command.sweep else _measure)(command)


def _expect_measurable(command: NodeCommand) -> None:
    """Raise ValueError for what cannot be measured or kept, before anything takes time."""
    if command.ranks > 1 and not command.sweep:
        raise ValueError(
            f"--ranks: expected it with --sweep, got {command.ranks} without: m3i-fast launch "
            f"--nproc-per-node {command.ranks} bench node {command.recipe} measures so many GPUs"
        )
    if command.config.data.any_shape:
        raise ValueError(
            "bench node: expected batches of squares, got data.max_tokens_per_batch: measure such "
            "a recipe by m3i-fast profile, or bench step --explain"
        )
    if command.json is not None and not command.json.absolute().parent.is_dir():
        raise ValueError(f"--json: expected a file in a folder that is there, got {command.json}")


def _measure(command: NodeCommand) -> None:
    schedule = command.schedule
    result = measure_node(command.config, schedule, make_data=command.synthetic_data)
    if result.is_main:
        figures = {"recipe": command.recipe, **result.figures}
        show(make_console(), figures)
        _keep(command, figures, result)
    leave_world()


def _sweep(command: NodeCommand) -> None:
    points = sweep(
        command.config,
        parse_sweep(command.sweep, command.config),
        command.schedule,
        make_data=command.synthetic_data,
        num_ranks=command.ranks,
    )
    figures = {"recipe": command.recipe, "num_ranks": command.ranks, "sweep": points}
    show_sweep(make_console(), figures)
    _keep(command, figures, None)


def _keep(command: NodeCommand, figures: dict[str, Any], result: NodeResult | None) -> None:
    if command.json is not None:
        command.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")
    if command.record:
        append_row(
            SUBJECT,
            figures,
            config=result.config if result else command.config,
            telemetry=result.telemetry if result else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeResult:
    """The figures of all ranks together, the same on each rank."""

    figures: dict[str, Any]
    config: TrainConfig
    """As it was run; shards that are gone have no place."""
    telemetry: dict[str, Any]
    """Of the first node, over all windows."""
    is_main: bool


def measure_node(cfg: TrainConfig, schedule: Schedule, *, make_data: bool) -> NodeResult:
    """Measure this node, or all nodes, and return the figures; every rank calls this."""
    world = join_world(resolve_device(cfg.device))
    if make_data and _num_nodes(world) > 1:
        raise ValueError(
            "--synthetic-data: expected one node, whose folder all ranks see, got "
            f"{_num_nodes(world)}: make pictures that all nodes see by m3i-fast data synthetic, "
            "and name them by --data.path"
        )
    with shards_of(cfg, make=make_data, world=world) as cfg, shared_folder(world) as folder:
        trainer = Trainer(cfg, folder / "run")
        try:
            works = works_of(trainer)
            series, telemetry = _windows_of(trainer, works, schedule)
            figures = _figures(trainer, world.gather(series))
            trained = works[BOTH]
            assert isinstance(trained, TrainWork)
            figures["final_loss"] = trained.loss
        finally:
            trainer.close()
    figures["schedule"] = asdict(schedule)
    config = replace(cfg, data=replace(cfg.data, path=PLACE)) if make_data else cfg
    return NodeResult(figures=figures, config=config, telemetry=telemetry, is_main=world.is_main)


def _windows_of(
    trainer: Trainer, works: dict[str, TimedWork], schedule: Schedule
) -> tuple[dict[str, Series], dict[str, Any]]:
    samples = _local_rank() == 0
    measure = partial(
        measure_windows,
        works,
        schedule,
        slowest=lambda seconds: max(trainer.world.gather(seconds)),
    )
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # whose GPUs alone are counted
    gpus = cuda_devices(num_ranks) if trainer.device.type == "cuda" else []
    with TelemetrySampler(devices=gpus) if samples else nullcontext() as telemetry:
        if telemetry is None:
            return measure(), {}
        begun = time.monotonic()
        series = measure(telemetry=telemetry.summary)
        return series, telemetry.summary(begun, time.monotonic())


def _figures(trainer: Trainer, ranks: list[dict[str, Series]]) -> dict[str, Any]:
    """Of all ranks; `ranks`: what each has timed."""
    cfg, num_nodes = trainer.cfg, _num_nodes(trainer.world)
    nodes = Nodes(len(ranks), len(ranks) // num_nodes)
    cores = cores_of_node(trainer.world.gather(allowed_cores()), nodes)
    measured = {
        name: summarise_ranks([own[name] for own in ranks], num_nodes=num_nodes)
        for name in ranks[0]
    }
    findings, both = find(ranks, measured), measured[BOTH]
    assert isinstance(trainer.loader, Loader)
    data = describe(trainer.loader.manifest, cfg.data.split)
    on_gpu = trainer.device.type == "cuda"
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    used = efficiency_figures(trainer, images_s=both.per_gpu.median)
    return {
        "device": trainer.device.type,
        "num_ranks": len(ranks),
        "num_nodes": num_nodes,
        "num_cores": cores,
        "num_threads": torch.get_num_threads(),
        "loader_threads": cfg.data.num_threads,
        "loader_cores": trainer.loader.placement.reason,
        "batch_size": cfg.data.batch_size,
        "accumulate": cfg.parallel.accumulate,
        "precision": trainer.arithmetic.recipe,
        "backend": trainer.arithmetic.backend,
        "attention": trainer.attention.kernel,
        "compile": cfg.compile,
        "data": data,
        "measurements": {name: asdict(each) for name, each in measured.items()},
        "images_s_per_gpu": both.per_gpu.median,
        "images_s_per_node": both.per_node.median,
        "loader_images_s_per_node": measured[LOADER].per_node.median,
        "loader_share": findings.loader.median / findings.synthetic.median,
        "data_wait_share": findings.data_wait,
        "exchange_share": findings.exchange_share,
        "verdict": asdict(verdict(findings)),
        "plan": planned(
            trainer,
            used,
            nodes=nodes,
            cores=cores,
            picture_bytes=data["shard_bytes_per_picture"],
        ),
        "efficiency": used,
        "joules_per_image": joules_per_image(ranks),
        "peak_memory_gib": peak_gib,
    }


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _num_nodes(world: World) -> int:
    return max(world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)), 1)
