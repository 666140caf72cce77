"""Races between CUDA streams: uses of device memory that no event or wait puts in an order.

torch's CUDA sanitizer (torch.cuda._sanitizer) keeps what each stream waits for, and works without a
GPU on the null runtime. It tells tensors apart by where they begin; here they are told apart by
their storage, so that a view and its base are the same memory, and memory that is freed while
another stream may still use it is found as well.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.cuda import _gpu_trace as gpu_trace
from torch.cuda._sanitizer import StreamSynchronizations, zip_arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
LEAVE_UNSET = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty}


@dataclass(frozen=True, slots=True)
class Use:
    """One operator's use of a storage on a stream."""

    stream: int
    number: int  # of the operator, over all streams
    writes: bool
    operator: str
    line: str  # FILE:LINE below the root, "?" where no such frame was active


@dataclass(frozen=True, slots=True)
class Race:
    """Two uses of the same memory that are not ordered; or one, and the end of the memory."""

    earlier: Use
    later: Use | None
    """None where the memory was freed, and may be given to others, before the use was over."""

    def __str__(self) -> str:
        first = self.earlier
        what = f"{first.operator} ({first.line}) on stream {first.stream:#x}"
        if self.later is None:
            return f"{what}: freed by another stream without record_stream or a wait"
        then = self.later
        return f"{what}, then without a wait {then.operator} ({then.line}) on {then.stream:#x}"


class StreamOrder(TorchDispatchMode):
    """Collects the races of what is dispatched while it is entered, backward passes included.

    root: folder whose lines the uses name, as NULL_CUDA_ROOT. The whole life of a stream has to be
    seen: enter this before the first one is made.
    """

    def __init__(self, root: Path) -> None:
        """Register for the events and waits of torch; they cannot be unregistered."""
        super().__init__()
        self.races: list[Race] = []
        self._root = str(root)
        self._order = StreamSynchronizations()
        self._number = 0
        self._owners: dict[int, int] = {}  # of each storage, the stream that it was allocated on
        self._uses: dict[int, list[Use]] = defaultdict(list)  # the last write and reads after it
        self._recorded: dict[int, set[int]] = defaultdict(set)  # by record_stream
        torch._C._activate_gpu_trace()
        order = self._order
        for name, call in {
            "event_creation": order.create_event,
            "event_deletion": order.delete_event,
            "event_record": order.record_state,
            "event_wait": lambda event, stream: order.stream_wait_for_event(stream, event),
            "stream_creation": order.create_stream,
            "device_synchronization": order.sync_all_streams,
            "stream_synchronization": order.all_streams_wait_for_stream,
            "event_synchronization": order.all_streams_wait_for_event,
            "memory_allocation": self._allocated,
            "memory_deallocation": self._freed,
        }.items():
            getattr(gpu_trace, f"register_callback_for_{name}")(call)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.cuda.is_current_stream_capturing():
            return func(
                *args, **kwargs
            )  # it runs on the stream of the replay, with all of its graph
        if func is aten.record_stream.default:
            self._recorded[_storage(args[0])].add(_handle(args[1]))
            return func(*args, **kwargs)
        written, read = _arguments(func, args, kwargs)
        out = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket not in LEAVE_UNSET:
            written |= {_storage(t) for t in tree_leaves(out) if _is_on_gpu(t)}
        if written or read:
            self._launched(str(func), written, read - written)
        return out

    def _launched(self, operator: str, written: set[int], read: set[int]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        self._number += 1
        self._order.update_seq_num(stream, self._number)
        line = self._line(sys._getframe())
        for storage in written | read:
            use = Use(stream, self._number, storage in written, operator, line)
            uses = self._uses[storage]
            for earlier in uses:
                if (use.writes or earlier.writes) and not self._is_done(earlier, stream):
                    self.races.append(Race(earlier, use))
            before = [u for u in uses if u.writes or u.stream != stream]
            self._uses[storage] = [use] if use.writes else [*before, use]

    def _is_done(self, use: Use, stream: int) -> bool:
        """Return whether what the stream does next comes after the use."""
        return self._order.is_ordered_after(stream, use.number, use.stream)

    def _allocated(self, pointer: int) -> None:
        self._owners[pointer] = torch.cuda.current_stream().cuda_stream
        self._uses.pop(pointer, None)
        self._recorded.pop(pointer, None)

    def _freed(self, pointer: int) -> None:
        owner = self._owners.pop(pointer, None)
        recorded = self._recorded.pop(pointer, set())
        for use in self._uses.pop(pointer, []):
            if owner is not None and use.stream not in (owner, *recorded):
                if not self._is_done(use, owner):
                    self.races.append(Race(use, None))

    def _line(self, frame: FrameType | None) -> str:
        """Return the innermost line below the root, not of a package and not of this folder."""
        here = str(Path(__file__).parent)
        while frame is not None:
            file = frame.f_code.co_filename
            own = file.startswith(self._root) and "/site-packages/" not in file
            if own and not file.startswith(here):
                return f"{file}:{frame.f_lineno}"
            frame = frame.f_back
        return "?"


def _is_on_gpu(value: Any) -> bool:
    is_there = isinstance(value, torch.Tensor) and value.is_cuda
    return is_there and value.untyped_storage().nbytes() > 0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _handle(stream: torch.Stream) -> int:
    """Return CUDA's handle of a stream, by which the callbacks name it."""
    of_torch = stream.stream_id, stream.device_index, stream.device_type
    return torch.cuda.Stream(
        stream_id=of_torch[0], device_index=of_torch[1], device_type=of_torch[2]
    ).cuda_stream


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[set[int], set[int]]:
    """Return the storages that an operator writes and reads; of a view it does neither."""
    written: set[int] = set()
    read: set[int] = set()
    for argument, value in zip_arguments(func._schema, args, kwargs):
        info = argument.alias_info
        if info is not None and not info.is_write:
            continue
        tensors = (t for t in tree_leaves(value) if _is_on_gpu(t))
        (read if info is None else written).update(map(_storage, tensors))
    return written, read
