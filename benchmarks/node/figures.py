"""From the windows of all ranks to the figures of a node, and to what its verdict rests on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3i_fast.benchmarks.core.rate_statistics import Rates, summarise_rates
from m3i_fast.benchmarks.core.timed_windows import Series, Window
from m3i_fast.benchmarks.node.bottleneck import Findings, Throttling
from m3i_fast.benchmarks.node.workloads import BOTH, LOADER, NO_EXCHANGE, SYNTHETIC

DATA_WAIT = "time/data.wait_ms"
MIN_KEPT = 3  # windows; and more than half of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The source images a second of one timed loop."""

    per_gpu: Rates
    """Of the mean over ranks."""
    per_node: Rates
    """Of the sum over a node's ranks."""
    per_rank: Sequence[float]
    """Medians."""
    step_ms: float
    stages_ms: Mapping[str, float]
    """A step's stages, means over ranks and windows."""
    steps_per_window: int
    num_windows: int
    num_throttled: int
    num_left_out: int
    """Throttled ones, which no figure is of."""
    num_warmup_steps: int
    is_settled: bool


def summarise_ranks(ranks: Sequence[Series], *, num_nodes: int = 1) -> Measurement:
    """Return the rates of all ranks together; ranks: the same loop as each rank timed it.

    A window in which any rank's card was throttled is left out where enough others remain.
    """
    windows = list(zip(*(series.windows for series in ranks), strict=True))
    kept = kept_windows(windows)
    sums = [sum(window.images_s for window in of_ranks) for of_ranks in kept]
    names = dict.fromkeys(n for of_ranks in kept for window in of_ranks for n in window.stages)
    flat = [window for of_ranks in kept for window in of_ranks]
    return Measurement(
        per_gpu=summarise_rates([total / len(ranks) for total in sums]),
        per_node=summarise_rates([total / num_nodes for total in sums]),
        per_rank=[statistics.median(w.images_s for w in own) for own in zip(*kept, strict=True)],
        step_ms=1e3 * statistics.median(window.step_s for window in flat),
        stages_ms={name: statistics.fmean(w.stages.get(name, 0.0) for w in flat) for name in names},
        steps_per_window=flat[0].num_steps,
        num_windows=len(windows),
        num_throttled=sum(map(is_throttled, windows)),
        num_left_out=len(windows) - len(kept),
        num_warmup_steps=ranks[0].num_warmup_steps,
        is_settled=all(series.is_settled for series in ranks),
    )


def is_throttled(of_ranks: Sequence[Window]) -> bool:
    return any(window.is_throttled for window in of_ranks)


def kept_windows(windows: Sequence[tuple[Window, ...]]) -> list[tuple[Window, ...]]:
    """Return the windows, each of all ranks, that figures are taken of."""
    others = [of_ranks for of_ranks in windows if not is_throttled(of_ranks)]
    enough = len(others) >= MIN_KEPT and 2 * len(others) > len(windows)
    return others if enough else list(windows)


def find(ranks: Sequence[Mapping[str, Series]], measured: Mapping[str, Measurement]) -> Findings:
    """Return the findings that `verdict` judges."""
    both = measured[BOTH]
    silent = measured.get(NO_EXCHANGE)
    return Findings(
        loader=measured[LOADER].per_gpu,
        synthetic=measured[SYNTHETIC].per_gpu,
        both=both.per_gpu,
        data_wait=min(both.stages_ms[DATA_WAIT] / both.step_ms, 1.0),
        num_ranks=len(ranks),
        without_exchange=silent.per_gpu if silent is not None else None,
        throttling=throttling([series[name] for series in ranks for name in (SYNTHETIC, BOTH)]),
    )


def throttling(computing: Sequence[Series]) -> Throttling:
    """Return how far cards were throttled in the windows in which they were read."""
    read = [w.telemetry for series in computing for w in series.windows if w.telemetry.get("gpus")]
    slow = [telemetry for telemetry in read if telemetry.get("throttled")]
    clocks = _clocks(slow, "mean")
    return Throttling(
        num_windows=len(read),
        num_throttled=len(slow),
        reasons=sorted({r for t in slow for g in t["gpus"] for r in g.get("throttle_reasons", ())}),
        mean_mhz=statistics.fmean(clocks) if clocks else None,
        max_mhz=max(_clocks(read, "max"), default=None),
    )


def _clocks(telemetry: Sequence[Mapping[str, Any]], which: str) -> list[float]:
    return [g["sm_clock_mhz"][which] for t in telemetry for g in t["gpus"] if "sm_clock_mhz" in g]


def joules_per_image(ranks: Sequence[Mapping[str, Series]]) -> float | None:
    """Return all nodes' energy over all ranks' images while training; None: not known."""
    windows = [window for series in ranks for window in series[BOTH].windows]
    energies = [w.telemetry["energy_j"] for w in windows if "energy_j" in w.telemetry]
    if not energies or None in energies:
        return None
    return sum(energies) / sum(window.num_images for window in windows)
