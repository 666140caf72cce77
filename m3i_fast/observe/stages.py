"""The stages of a training step, and a timer for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from m3i_fast.observe.nvtx import NvtxRange

STAGES = {
    "data.wait": "Data",
    "h2d": "Copy to device",
    "mix": "Mixing",
    "replay": "Whole step, as a CUDA graph",
    "fwd.target": "Targets",
    "fwd.input": "Encoder",
    "fwd.text": "Text encoder",
    "loss": "Predictors, loss",
    "bwd": "Backward",
    "comm": "Averaging over ranks",
    "clip": "Clipping",
    "optim": "Optimiser",
    "ema": "EMA",
    "log": "Metrics",
    "ckpt": "Checkpoint",
}
"""Stages of a step in their order, with titles for a reader. `loss` stands for `loss.<term>` and
for `loss.total`, which is the sum, its balance and the monitors. `replay` is all stages between
mixing and metrics, with `cuda_graphs` step."""


def family_of(stage: str) -> str:
    """Return the key of STAGES that a stage belongs to."""
    return "loss" if stage.startswith("loss.") else stage


@dataclass(slots=True, eq=False)
class _Span:
    name: str
    begin: Any  # torch.cuda.Event, or seconds of the clock
    end: Any = None
    inner: list[_Span] = field(default_factory=list)

    def seconds(self) -> float:
        if isinstance(self.begin, float):
            return float(self.end - self.begin)
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end)) / 1000


class StageTimer:
    """Times the stages of a step, by CUDA events on a GPU, by the clock elsewhere.

    A stage inside another one is not counted twice: the times of all stages sum to the time in
    which any was open. On a GPU they are read when logging. Every stage is an NVTX range.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.mark: Callable[[str], AbstractContextManager[Any]] = NvtxRange
        """Context that also marks a stage; a profiler puts its own here while it records."""
        self._open: list[_Span] = []
        self._spans: list[_Span] = []
        self._read: dict[str, float] = {}
        self._steps = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the enclosed part of the step under this name."""
        outer = self._open[-1] if self._open else None
        span = _Span(name, self._now())
        self._open.append(span)
        try:
            with self.mark(name):
                yield
        finally:
            self._open.remove(span)
        span.end = self._now()
        self._spans.append(span)
        if outer is not None:
            outer.inner.append(span)

    @property
    def innermost(self) -> str | None:
        """Return the innermost open stage, to any thread; None outside all stages."""
        innermost = self._open[-1:]  # at once, as the thread of the steps goes on
        return innermost[0].name if innermost else None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def count_step(self) -> None:
        """Count a step that the times since the last read are averaged over."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the milliseconds a step of every stage since the last read, as `time/<stage>_ms`.

        A stage that is open now counts at the next read.
        """
        sums = _seconds(self._spans)
        for name, seconds in sums.items():
            self._read[name] = self._read.get(name, 0.0) + seconds
        steps = max(self._steps, 1)
        self._spans.clear()
        self._steps = 0
        return {f"time/{name}_ms": 1000 * total / steps for name, total in sums.items()}

    def totals(self) -> dict[str, float]:
        """Return the seconds of every stage that was closed so far, read or not."""
        sums = _seconds(self._spans)
        return {name: self._read.get(name, 0.0) + sums.get(name, 0.0) for name in self._read | sums}


def _seconds(spans: list[_Span]) -> dict[str, float]:
    """Return the seconds of every stage, without the stages inside it."""
    sums: dict[str, float] = {}
    for span in spans:
        own = span.seconds() - sum(inner.seconds() for inner in span.inner)
        sums[span.name] = sums.get(span.name, 0.0) + own
    return sums
