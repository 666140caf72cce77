"""What every benchmark shares: its arguments, timing, and tables of rows that go to the ledger."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table

from m3i_fast.benchmarks.ledger.rows import append_row
from m3i_fast.terminal import make_console

Device = Literal["auto", "cpu", "cuda"]

# A sample on the CPU repeats a function until it lasts this long: far above the clock's resolution.
MIN_SAMPLE_S = 0.002


@dataclass(frozen=True, slots=True)
class Timing:
    """The milliseconds of one call, over all samples."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    num_samples: int
    samples_ms: tuple[float, ...] = ()
    """In the order in which they were taken; empty in rows of before they were kept."""


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    num_samples: int = 50,
    warmup_s: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions against one another; each is called without arguments.

    Every round takes one sample of each, starting with another one, so that drifting clocks and a
    busy neighbour meet all alike. Before that each runs for `warmup_s`. On CUDA a sample is one
    call between two events after the L2 cache was overwritten, and nothing waits for the device
    within a round. On the CPU it is as many calls as fill MIN_SAMPLE_S. clock: seconds, of the CPU.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    sampler = _CudaSampler(device) if torch.device(device).type == "cuda" else _CpuSampler(clock)
    for name, function in functions.items():
        sampler.warm_up(name, function, warmup_s)
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(num_samples):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            sampler.start(name, functions[name])
        for name, milliseconds in sampler.finish():
            samples[name].append(milliseconds)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(samples_ms: list[float]) -> Timing:
    """Return the median and the outer fifths of one sample or more."""
    kept = tuple(float(f"{sample:.4g}") for sample in samples_ms)
    if len(samples_ms) == 1:
        return Timing(samples_ms[0], samples_ms[0], samples_ms[0], 1, kept)
    fifths = statistics.quantiles(samples_ms, n=5, method="inclusive")
    return Timing(statistics.median(samples_ms), fifths[0], fifths[-1], len(samples_ms), kept)


class _CpuSampler:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._calls: dict[str, int] = {}
        self._done: list[tuple[str, float]] = []

    def warm_up(self, name: str, function: Callable[[], object], seconds: float) -> None:
        function()  # may compile
        calls, begun = 0, self._clock()
        while (elapsed := self._clock() - begun) < seconds or not calls:
            function()
            calls += 1
        self._calls[name] = max(1, round(MIN_SAMPLE_S * calls / max(elapsed, 1e-9)))

    def start(self, name: str, function: Callable[[], object]) -> None:
        calls, begun = self._calls[name], self._clock()
        for _ in range(calls):
            function()
        self._done.append((name, (self._clock() - begun) * 1e3 / calls))

    def finish(self) -> list[tuple[str, float]]:
        done, self._done = self._done, []
        return done


class _CudaSampler:
    def __init__(self, device: torch.device | str) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._device = device

    def warm_up(self, _name: str, function: Callable[[], object], seconds: float) -> None:
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            function()
            torch.cuda.synchronize(self._device)

    def start(self, name: str, function: Callable[[], object]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        function()
        end.record()
        self._pending.append((name, begin, end))

    def finish(self) -> list[tuple[str, float]]:
        torch.cuda.synchronize(self._device)
        pending, self._pending = self._pending, []
        return [(name, begin.elapsed_time(end)) for name, begin, end in pending]


def parse_counts(ranks: str, flag: str = "ranks") -> list[int]:
    """Return the numbers of `1,2,4`. Raises ValueError, which names the flag, unless they rise."""
    try:
        counts = [int(count) for count in ranks.split(",")]
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts != sorted(set(counts)):
        raise ValueError(f"{flag}: expected rising numbers of processes, as 1,2,4, got {ranks!r}")
    return counts


def resolve(device: Device) -> str:
    """Return cpu or cuda; auto is the GPU where torch sees one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def publish(
    subject: str,
    rows: Iterable[dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], Table],
    *,
    record: bool,
) -> None:
    """Append rows to the subject's ledger, where asked for, each once measured; print their table.

    So that an interrupted benchmark keeps what it has measured. A row's `config`, a TrainConfig,
    is no figure: it goes to the ledger's own field.
    """
    measured: list[dict[str, Any]] = []
    paths = set()
    for row in rows:
        measured.append(row)
        if record:
            figures = dict(row)
            config = figures.pop("config", None)
            paths.add(append_row(subject, figures, config=config))
    console = make_console()
    console.print(table(measured))
    if record:
        places = ", ".join(map(str, paths))
        console.print(f"{len(measured)} rows appended to {places}", soft_wrap=True)


def ratio_table(
    subject: str,
    heading: str,
    rows: list[dict[str, Any]],
    label: Callable[[dict[str, Any]], str],
    more: Mapping[str, Callable[[dict[str, Any], str], str]] | None = None,
) -> Table:
    """Return a table with a line for each function of each row.

    label: what a row measured, under `heading`; more: further columns, of a row and a function.
    """
    more = more or {}
    title = f"{subject} on {rows[0]['device']}, {rows[0]['num_threads']} threads"
    if len(dtypes := {row["dtype"] for row in rows}) == 1:
        title += f", {dtypes.pop()}"
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(heading, no_wrap=True)
    for column in ("ms", "p20 - p80", "x ours", *more):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(label(row))
        for name, timing in row["timings"].items():
            t = Timing(**timing)
            shown.add_row(
                f"  {name}",
                f"{t.median_ms:.3g}",
                f"{t.p20_ms:.3g} - {t.p80_ms:.3g}",
                f"{row['times_slower_than_ours'][name]:.2f}",
                *(text(row, name) for text in more.values()),
            )
        shown.add_section()
    return shown
