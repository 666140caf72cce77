"""Profiles steady steps of a run, between steps that are only timed, to show the overhead."""

from __future__ import annotations

import logging
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.nvtx import NvtxRange
from m3i_fast.observe.stages import StageTimer
from m3i_fast.pipelines import batch as pipelines_batch
from m3i_fast.profiling.recording import BETWEEN, STEP
from m3i_fast.profiling.summary import HostWait, Pace

logger = logging.getLogger(__name__)

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive"}
"""Operators whose result is on the host, or has a size that only the device knows."""
MAX_FRAMES = 6
CAPTURE = "m3i_fast.profile"
"""The NVTX range that nsys captures on a CPU: --nvtx-capture."""


class ProfilerControl(Protocol):
    """Starts and stops a profiler. `stop` is called once after every `start`, whatever happens."""

    def start(self, timer: StageTimer) -> None:
        """Start recording."""

    def stop(self, timer: StageTimer) -> None:
        """Stop recording."""


class TorchProfiler:
    """torch.profiler, whose trace is written to `path`, gzipped for a name in .gz."""

    def __init__(self, path: Path, device: torch.device) -> None:
        kinds = [ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        self._path = path
        self._profile = profile(activities=kinds, record_shapes=True, acc_events=True)

    def start(self, timer: StageTimer) -> None:
        """Start recording; stages are marked by record_function."""
        self._profile.start()
        self._mark, timer.mark = timer.mark, record_function

    def stop(self, timer: StageTimer) -> None:
        """Stop recording and write the trace."""
        timer.mark = self._mark
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._path))


class NoProfiler:
    """No profiler, for the ranks beside the one that is profiled."""

    def start(self, timer: StageTimer) -> None:
        """Do nothing: this rank is not recorded."""

    def stop(self, timer: StageTimer) -> None:
        """Do nothing: this rank was not recorded."""


class NsysProfiler:
    """Opens and closes what nsys captures: cudaProfilerApi on a GPU, an NVTX range on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._range = NvtxRange(CAPTURE)

    def start(self, timer: StageTimer) -> None:
        """Open the range."""
        if self._on_gpu:
            torch.cuda.profiler.start()
        else:
            self._range.__enter__()

    def stop(self, timer: StageTimer) -> None:
        """Close the range."""
        if self._on_gpu:
            torch.cuda.profiler.stop()
        else:
            self._range.__exit__()


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Numbers of steps: of the warm-up, and of each of the three windows after it."""

    warmup: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("warmup", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def total(self) -> int:
        """Return the number of all steps, the one that records host waits included."""
        return self.warmup + 3 * self.steps + 1

    def expect_in(self, num_steps: int) -> None:
        """Raise ValueError where a run has fewer steps."""
        if num_steps < self.total:
            raise ValueError(
                f"--warmup, --steps: expected warmup + 3 steps + 1 of at most --num-steps "
                f"{num_steps}, got {self.total}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the program itself measured beside the profiler."""

    pace: Pace
    stages: Mapping[str, float]
    """Milliseconds a profiled step of every stage, by the program's own timer."""
    waits: Sequence[HostWait]


def profile_steps(trainer: Trainer, control: ProfilerControl, windows: Windows) -> Measured:
    """Warm up, time, profile, time again, and record host waits in one more step.

    The capture is closed whatever ends it: an exception, Ctrl-C or a signal. Raises SystemExit with
    128 + n at signal n.
    """
    trainer.log.open(trainer.step)
    with ended_by_signals():
        _steps(trainer, windows.warmup)
        before = _steps(trainer, windows.steps)
        earlier = trainer.log.timer.totals()
        with _capture(control, trainer.log.timer):
            profiled = _steps(trainer, windows.steps)
        later = trainer.log.timer.totals()
        after = _steps(trainer, windows.steps)
        waits = find_waits(trainer)
    return Measured(
        pace=Pace(before_ms=before, profiled_ms=profiled, after_ms=after),
        stages={
            name: 1000 * (total - earlier.get(name, 0.0)) / windows.steps
            for name, total in later.items()
        },
        waits=waits,
    )


def _steps(trainer: Trainer, count: int) -> float:
    """Take `count` steps and return the milliseconds a step, with a device wait at both ends."""
    _wait_for(trainer.device)
    began = time.perf_counter()
    for _ in range(count):
        with trainer.log.timer.mark(STEP):
            trainer.advance()
    _wait_for(trainer.device)
    return 1000 * (time.perf_counter() - began) / count


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _capture(control: ProfilerControl, timer: StageTimer) -> Iterator[None]:
    control.start(timer)
    try:
        yield
    finally:
        control.stop(timer)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise SystemExit with 128 + n at a signal n to end, so that open resources are closed."""

    def end(number: int, frame: FrameType | None) -> Any:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---- Waits of the host ---------------------------------------------------------------------------


def find_waits(trainer: Trainer) -> list[HostWait]:
    """Return the lines at which a step reads from the device, or would if its tensors were there.

    It takes one step, with compiled parts run eagerly, since only Python knows the line.
    """
    recorder = HostWaitRecorder(lambda: trainer.log.timer.innermost or BETWEEN)
    with torch.compiler.set_stance("force_eager"), recorder:
        trainer.advance()
    return recorder.waits()


class HostWaitRecorder(TorchDispatchMode):
    """Records every read of a tensor by the host, with our line that causes it.

    On a machine with a GPU only reads of its tensors count. `Tensor.tolist` of a host tensor and
    copies to it are no operators that wait, and are not recorded.
    """

    def __init__(self, stage: Callable[[], str]) -> None:
        super().__init__()
        self._stage = stage
        self._counts: Counter[tuple[str, str, tuple[str, ...]]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        to_host = name in ("_to_copy", "copy_") and _reads(args, kwargs or {})
        if to_host or (name in READS and _is_of_device(tensors)):
            self._counts[f"aten::{name}", self._stage(), _our_frames()] += 1
        return func(*args, **(kwargs or {}))

    def waits(self) -> list[HostWait]:
        """Return the recorded waits, the most frequent first."""
        return [
            HostWait(name=name, stage=stage, stack=stack, calls=calls)
            for (name, stage, stack), calls in self._counts.most_common()
        ]


def _is_of_device(tensors: list[Tensor]) -> bool:
    return not torch.cuda.is_available() or any(tensor.is_cuda for tensor in tensors)


def _reads(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a copy goes from a GPU to the host and the host waits for it."""
    if len(args) > 1 and isinstance(args[1], Tensor):  # copy_
        source, target, waits = args[1], args[0].device, not (args[2] if len(args) > 2 else False)
    else:
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
        waits = not kwargs.get("non_blocking", False)
    return bool(source.is_cuda and target.type == "cpu" and waits)


def _our_frames() -> tuple[str, ...]:
    """Return `file:line function` of this package's frames, the innermost first."""
    here = Path(__file__)
    folders = here.parents[1], Path(pipelines_batch.__file__).parent  # two folders in a checkout
    frames = []
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        folder = next((f for f in folders if path != here and path.is_relative_to(f)), None)
        if folder is not None:
            frames.append(f"{path.relative_to(folder.parent)}:{frame.lineno} {frame.name}")
    return tuple(frames[:MAX_FRAMES])
