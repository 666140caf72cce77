"""The whole training step as one CUDA graph: from the forward pass to the moving average.

What a graph reads it reads at the addresses of its capture. So batch and mix are copied into
tensors of the graph, schedules stand on the device (`DeviceSchedules`), and what a step returns is
copied out before the next replay writes over it. Weights, moments, averages, buffers and the
guard's statistics are updated in place, by a replay as by a step without one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from m3i_fast.engine.cuda_graphs import Replayable
from m3i_fast.engine.guard.guard import Judgement
from m3i_fast.engine.parallel.local_shards import GradientNorm
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.step_context import Stage, no_stage
from m3i_fast.pipelines.batch import Batch

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Steps without a graph before the capture. The first one allocates all state, creates libraries'
# handles and loads every kernel that the capture meets: a second would find nothing new.
NUM_WARMUP = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step leaves on the device, beside the state that it updates in place."""

    metrics: dict[str, Tensor]
    """[] each, by name."""
    skip: Tensor
    """[] fp32, 1 where the guard skipped the step."""
    judgement: Judgement
    gradients: tuple[str, ...]
    """Names of the gradients, in the order of the judged norms."""

    def packed(self) -> Tensor:  # [M + L + P + 4] fp32
        """Return all values in one tensor: one copy takes them out of a graph's memory."""
        judged = self.judgement
        metrics = torch.stack([value.detach().float() for value in self.metrics.values()])
        scalars = torch.stack([self.skip, judged.norm.total.float()])
        return torch.cat([metrics, scalars, judged.flags, judged.losses, judged.norm.each.float()])

    def unpacked(self, values: Tensor) -> StepResult:  # as `packed` returned it
        """Return the same result with these values, as views of them."""
        judged = self.judgement
        sizes = [len(self.metrics), 2, len(judged.flags), len(judged.losses), len(self.gradients)]
        metrics, scalars, flags, losses, each = values.split(sizes)
        skip, total = scalars.unbind()
        return replace(
            self,
            metrics=dict(zip(self.metrics, metrics.unbind(), strict=True)),
            skip=skip,
            judgement=replace(judged, flags=flags, losses=losses, norm=GradientNorm(total, each)),
        )


class Compute(Protocol):
    """All of a step that runs on the device, without monitors and measurements."""

    def __call__(
        self, batches: Sequence[Batch], mixes: Iterator[Mix], *, stage: Stage
    ) -> StepResult:
        """Take the step; nothing in it may read a value on the host."""


Work = Callable[[], tuple[StepResult, Tensor]]
"""Takes a step; returns its result, and that `packed`."""


class Recorder(Protocol):
    """Captures steps on a device for replays."""

    def warm_up(self, work: Work) -> StepResult:
        """Take the step as it will be captured, without capturing it."""

    def capture(self, work: Work) -> tuple[Replayable, StepResult, Tensor]:
        """Capture the step, which is not taken, and return what replays it and what it returned."""


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A captured step: the tensors that it reads, what replays it, and what that writes."""

    inputs: tuple[Sequence[Batch], Sequence[Mix]]
    graph: Replayable
    result: StepResult
    packed: Tensor

    def __call__(self, *inputs: Any) -> StepResult:
        """Copy batches and mixes in, replay the step and copy its values out."""
        for own, given in zip(_leaves(self.inputs), _leaves(inputs), strict=True):
            if isinstance(own, Tensor):
                is_upload = own.is_cuda and not given.is_cuda
                own.copy_(given.contiguous().pin_memory() if is_upload else given, True)
        self.graph.replay()
        return self.result.unpacked(self.packed.clone())


class StepGraph:
    """Takes steps by replaying one graph, once NUM_WARMUP steps of the same shapes were taken.

    A step whose batches or mixes have other shapes than the captured one's is computed without a
    graph, with a warning the first time. Raises ValueError where there is more than one rank, or no
    GPU to capture on.
    """

    def __init__(
        self,
        compute: Compute,
        world: World,
        *,
        stage: Stage = no_stage,
        recorder: Recorder | None = None,
    ) -> None:
        if world.size > 1:
            raise ValueError(
                f"cuda_graphs: expected one GPU with step, got {world.size} ranks; set "
                "--cuda-graphs modules, or none"
            )
        if recorder is None and world.device.type != "cuda":
            raise ValueError(
                f"cuda_graphs: expected a GPU, got {world.device}; set --cuda-graphs none"
            )
        self._compute, self._stage, self._device = compute, stage, world.device
        self._recorder = recorder or GpuRecorder(world.device)
        self._has_warned = False
        self.reset()

    def reset(self) -> None:
        """Forget the captured step, after which the next ones warm up and capture anew.

        To be called where a tensor of the model or of its optimiser's state was replaced.
        """
        self._kind: Any = None
        self._num_warm = 0
        self._captured: CapturedStep | None = None

    def __call__(self, batches: Sequence[Batch], mixes: Sequence[Mix]) -> StepResult:
        """Take a step; mixes: of each batch, on the CPU."""
        kind = [_kind(leaf) for leaf in _leaves((batches, mixes))]
        if self._kind is None:
            self._kind = kind
        if kind != self._kind:
            self._warn(kind)
            return self._without_graph(batches, mixes)
        if self._captured is None and self._num_warm < NUM_WARMUP:
            self._num_warm += 1
            return self._recorder.warm_up(lambda: _with_packed(self._without_graph(batches, mixes)))
        with self._stage("replay"):
            if self._captured is None:
                self._captured = self._capture(batches, mixes)
            return self._captured(batches, mixes)

    def _without_graph(self, batches: Sequence[Batch], mixes: Sequence[Mix]) -> StepResult:
        on_device = (mix.to(self._device) for mix in mixes)
        return self._compute(batches, on_device, stage=self._stage)

    def _capture(self, batches: Sequence[Batch], mixes: Sequence[Mix]) -> CapturedStep:
        own_batches = [_mapped(batch, Tensor.clone) for batch in batches]
        own_mixes = [_mapped(mix.to(self._device), Tensor.clone) for mix in mixes]

        graph, result, packed = self._recorder.capture(
            lambda: _with_packed(self._compute(own_batches, iter(own_mixes), stage=no_stage))
        )
        return CapturedStep((own_batches, own_mixes), graph, result, packed)

    def _warn(self, kind: list[Any]) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        pairs = [(len(self._kind), len(kind)), *zip(self._kind, kind, strict=False)]
        expected, got = next(pair for pair in pairs if pair[0] != pair[1])
        logger.warning(
            "cuda_graphs step: expected the shapes of the first step, %s, got %s; such steps are "
            "launched kernel by kernel",
            expected,
            got,
        )


class GpuRecorder:
    """Captures on a stream of its own, which steps also warm up on.

    So the nodes that accumulate gradients, which belong to the stream that they were created on,
    are of the stream of the capture. Other threads, such as the loader's, go on: only this thread
    is checked for operations that a capture cannot hold.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, work: Work) -> StepResult:
        """Take the step on the stream, between what this thread's stream does before and after."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result, packed = work()
        current.wait_stream(self._stream)
        packed.record_stream(current)
        return result.unpacked(packed)

    def capture(self, work: Work) -> tuple[Replayable, StepResult, Tensor]:
        """Capture the step; raise RuntimeError, naming the flag, for what no graph can hold."""
        graph = torch.cuda.CUDAGraph()
        recording: AbstractContextManager[None] = torch.cuda.graph(
            graph, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with recording:
                result, packed = work()
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken capture raises once more
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).partition("\n")[0]
            raise RuntimeError(
                f"cuda_graphs step: the step cannot be captured: {reason}. Set --cuda-graphs "
                "modules, or none"
            ) from error
        return graph, result, packed


def _with_packed(result: StepResult) -> tuple[StepResult, Tensor]:
    return result, result.packed()


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what sequences, dictionaries and dataclasses hold, in order."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))
    else:
        yield value


def _mapped(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return a dataclass with `function` of each of its tensors."""

    def mapped(each: Any) -> Any:
        if isinstance(each, tuple):
            return tuple(map(mapped, each))
        if isinstance(each, dict):
            return {name: mapped(part) for name, part in each.items()}
        return function(each) if isinstance(each, Tensor) else each

    changes = {field.name: mapped(getattr(value, field.name)) for field in fields(value)}  # type: ignore[arg-type]
    return replace(value, **changes)  # type: ignore[type-var]


def _kind(leaf: Any) -> Any:
    """Return what of an input the kernels of a step depend on, beside a tensor's values."""
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf
