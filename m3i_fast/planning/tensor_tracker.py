"""Which tensors are alive while a step runs, by the part of the model that made them."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRADIENTS, OTHER, CAST_WEIGHTS = "gradients", "backward and optimiser", "weights in bf16"


class TensorTracker(TorchDispatchMode):
    """Counts the bytes of storages from their allocation to their end, as an allocator would.

    What an op allocates for itself is not seen, but for what `scratch` tells. Inside a
    FakeTensorMode nothing is computed and nothing is allocated, and the count is the same. There a
    host that asks whether `any` or `all` elements are set is told yes, and no to every other
    question, and the fused SGD of the moving average, which torch has no fake form of, is passed
    over: it allocates nothing.

    num_shards: ranks that share a gradient; `sharded_peak` is the peak with as much of it here.
    scratch: op -> function of its arguments that returns the bytes it allocates while it runs.
    """

    def __init__(
        self, *, num_shards: int = 1, scratch: Mapping[Any, Callable[..., int]] | None = None
    ) -> None:
        super().__init__()
        self.num_shards = num_shards
        self.scratch = scratch or {}
        self.part = OTHER
        self.bytes: defaultdict[str, int] = defaultdict(int)
        self.reset_peak()
        self._live: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._parameters: set[int] = set()
        self._last: Any = None

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def reset_peak(self) -> None:
        """Forget the peaks so far: from here on they are at least what is alive now."""
        self.peak = dict(self.bytes)
        self.sharded_peak = dict(self.bytes)
        self._most = self.total
        self._most_sharded = self._sharded_total()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what is allocated inside as part of `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def book(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors as of this part, also where they were counted as of another."""
        for tensor in tensors:
            self._enter(tensor, part)
            alive, before, size = self._live[_key(tensor)]
            self.bytes[before] -= size
            self.bytes[part] += size
            self._live[_key(tensor)] = alive, part, size

    def watch_casts(self, parameters: Iterable[Tensor]) -> None:
        """Count copies of these in another type as a part of their own."""
        self._parameters |= {_key(parameter) for parameter in parameters}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            return self._last in (torch.ops.aten.any.default, torch.ops.aten.all.default)
        if func is torch.ops.aten._fused_sgd_.default and _is_fake(args[0][0]):
            return None
        self._last = func
        out = func(*args, **(kwargs or {}))
        part = self.part
        if func is torch.ops.aten._to_copy.default and _key(args[0]) in self._parameters:
            part = CAST_WEIGHTS
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf, part)
        if func in self.scratch:  # beside the results
            size = self.scratch[func](*args)
            self.bytes[part] += size
            self._note_peak()
            self.bytes[part] -= size
        return out

    def _enter(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def gone(_: Any) -> None:
            _, last, size = self._live.pop(key)
            self.bytes[last] -= size

        self._live[key] = weakref.ref(storage, gone), part, size
        self.bytes[part] += size
        self._note_peak()

    def _note_peak(self) -> None:
        if self.total > self._most:
            self._most, self.peak = self.total, dict(self.bytes)
        if self._sharded_total() > self._most_sharded:
            self._most_sharded, self.sharded_peak = self._sharded_total(), dict(self.bytes)

    def _sharded_total(self) -> int:
        gradients = self.bytes[GRADIENTS]
        return self.total - gradients + gradients // self.num_shards


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_fake(tensor: Tensor) -> bool:
    return type(tensor) is not Tensor and hasattr(tensor, "fake_mode")
