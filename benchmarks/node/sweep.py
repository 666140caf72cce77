"""`bench node --sweep`: every combination of some settings, each in a process of its own.

    batch            data.batch_size; usually half, once and twice the recipe's
    precision        all that there are; what this machine has none of is refused, with the reason
    loader-threads   data.num_threads; usually powers of two up to the cores
    hw-decoder-load  data.hw_decoder_load, of decoding on a GPU

A process leaves no memory to the next, and no code compiled in it. A batch that does not fit is
halved until one does, each try in the row.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch

from m3i_fast.benchmarks.core.timed_windows import Schedule
from m3i_fast.benchmarks.node.shards import EPOCH_BATCHES, shards_of
from m3i_fast.config import Precision, TrainConfig
from m3i_fast.did_you_mean import nearest
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.observe.environment import num_cores

POINT = "m3i_fast.benchmarks.node.sweep_point"
HW_DECODER_LOADS = (0.0, 0.4, 0.65, 0.8, 1.0)
PRECISIONS = tuple(name for name in get_args(Precision) if name != "auto")

Value = int | float | str
Status = Literal["measured", "out of memory", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Axis:
    kind: type[int] | type[float] | type[str]
    set: Callable[[TrainConfig, Any], TrainConfig]
    usual: Callable[[TrainConfig], Sequence[Value]]


def _in_data(name: str) -> Callable[[TrainConfig, Any], TrainConfig]:
    return lambda cfg, value: replace(cfg, data=replace(cfg.data, **{name: value}))


def _batches(cfg: TrainConfig) -> list[int]:
    size = cfg.data.batch_size
    return [size // 2, size, 2 * size]


def _threads(_: TrainConfig) -> list[int]:
    cores = num_cores()
    return sorted({*(2**n for n in range(cores.bit_length()) if 2**n <= cores), cores})


BATCH = "batch"
AXES = {
    BATCH: Axis(int, _in_data("batch_size"), _batches),
    "precision": Axis(str, lambda cfg, value: replace(cfg, precision=value), lambda _: PRECISIONS),
    "loader-threads": Axis(int, _in_data("num_threads"), _threads),
    "hw-decoder-load": Axis(float, _in_data("hw_decoder_load"), lambda _: HW_DECODER_LOADS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    values: Mapping[str, Value]
    """Of every axis, and the batch."""
    status: Status
    reason: str = ""
    """Why it is not measured; of one that is: the batch that did not fit."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    is_best: bool = False

    @property
    def images_s(self) -> float:
        return float(self.figures["images_s_per_node"]) if self.status == "measured" else 0.0


Run = Callable[[TrainConfig, Mapping[str, Value]], Point]


def parse_sweep(texts: Sequence[str], cfg: TrainConfig) -> dict[str, Sequence[Value]]:
    """Return the values of each axis of `batch=64,128` or `batch`. Raises ValueError."""
    swept: dict[str, Sequence[Value]] = {}
    for text in texts:
        name, has_values, values = text.partition("=")
        if name not in AXES:
            raise ValueError(
                f"--sweep: expected some of {', '.join(AXES)}, got {name!r}." + nearest(name, AXES)
            )
        axis = AXES[name]
        try:
            given = [axis.kind(value) for value in values.split(",")]
        except ValueError:
            given = []
        if has_values and not given:
            raise ValueError(
                f"--sweep {name}: expected {axis.kind.__name__}s as {name}="
                f"{','.join(map(str, axis.usual(cfg)[:2]))}, got {values!r}"
            )
        swept[name] = given if has_values else axis.usual(cfg)
    return swept


def sweep(
    cfg: TrainConfig,
    axes: Mapping[str, Sequence[Value]],
    schedule: Schedule,
    *,
    make_data: bool,
    num_ranks: int,
) -> list[dict[str, Any]]:
    """Return the points as a row holds them; pictures are made once for all of them."""
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"--sweep: expected one process, which starts {started} for each point with --ranks "
            f"{started}, got {started} processes"
        )
    largest = max([cfg.data.batch_size, *(int(size) for size in axes.get(BATCH, ()))])
    here, count = World(torch.device("cpu")), EPOCH_BATCHES * largest * num_ranks
    with shards_of(cfg, make=make_data, world=here, num_pictures=count) as fitted:

        def run(point: TrainConfig, values: Mapping[str, Value]) -> Point:
            return run_point(point, values, schedule, num_ranks=num_ranks)

        points = list(measure_points(fitted, axes, run))
    return [asdict(point) for point in mark_best(points)]


def measure_points(
    cfg: TrainConfig, axes: Mapping[str, Sequence[Value]], run: Run
) -> Iterator[Point]:
    """Measure each combination once; one that does not fit, again with half the batch."""
    combinations = [
        dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())
    ]
    known = [{BATCH: cfg.data.batch_size, **values} for values in combinations]
    for values in list(known):
        reason = ""
        while True:
            point = replace(_measure(cfg, values, run), values=values)
            yield point if point.reason else replace(point, reason=reason)
            half = {**values, BATCH: _half(cfg, int(values[BATCH]))}
            if point.status != "out of memory" or not half[BATCH] or half in known:
                break
            reason = f"batch {values[BATCH]} did not fit"
            values = half
            known.append(values)


def _measure(cfg: TrainConfig, values: Mapping[str, Value], run: Run) -> Point:
    try:
        for name, value in values.items():
            cfg = AXES[name].set(cfg, value)
    except ValueError as error:
        return Point(values=values, status="refused", reason=str(error))
    return run(cfg, values)


def _half(cfg: TrainConfig, batch: int) -> int:
    """Return the next batch to try; 0: there is none."""
    step = cfg.objective.mixing.images_per_input
    return batch // 2 - batch // 2 % step


def mark_best(points: Sequence[Point]) -> list[Point]:
    """Mark the fastest point, where any was measured."""
    best = max(points, key=lambda point: point.images_s)
    return [replace(p, is_best=p is best and p.status == "measured") for p in points]


def run_point(
    cfg: TrainConfig, values: Mapping[str, Value], schedule: Schedule, *, num_ranks: int
) -> Point:
    """Measure one combination in a fresh process; torchrun starts several ranks."""
    with TemporaryDirectory(prefix="m3i-node-") as name:
        config, result = Path(name) / "config.json", Path(name) / "result.json"
        cfg.save(config)
        command = [sys.executable, "-m"]
        if num_ranks > 1:
            ranks = ["--standalone", "--nproc-per-node", str(num_ranks), "-m"]
            command += ["torch.distributed.run", *ranks]
        job = json.dumps(asdict(schedule))
        done = subprocess.run(
            [*command, POINT, str(config), job, str(result)], stderr=subprocess.PIPE, text=True
        )
        if result.exists():
            return Point(values=values, **json.loads(result.read_text()))
    if done.returncode == -signal.SIGKILL:
        return Point(values=values, status="out of memory", reason="killed by the system")
    reason = f"exit code {done.returncode}: {last_words(done.stderr)}"
    return Point(values=values, status="failed", reason=reason)


def last_words(stderr: str) -> str:
    """Return the line that says what went wrong: that of the first error, else the last one.

    torchrun ends with a report of its own, of rules and of times.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" =-\t")]
    of_ranks = [re.sub(r"^\[rank\d+\]:\s*", "", line) for line in lines]
    errors = [line for line in of_ranks if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors[:1] or of_ranks[-1:] or [""])[0]
