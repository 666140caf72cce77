"""Real numbers on the null CUDA runtime: every operator is computed by the CPU over its memory.

The null runtime's device memory is the host's. In this mode torch dispatches an operator on CUDA
tensors as ever, with its allocations and launches (which compute nothing), and then the same
operator is called on CPU tensors that alias the same memory. What a CUDA graph captures is called
at each replay instead, on the memory of the capture, whatever that holds by then.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map

from m3i_fast.ops import boltzmann_rows
from m3i_fast.ops.library import m3i

aten = torch.ops.aten
# What leaves its bytes unset, and what the runtime does itself.
NOT_COMPUTED = {
    *(aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty),
    *(aten._pin_memory, aten.set_, aten.record_stream),
}
# Operators of collectives, which the null NCCL computes.
COLLECTIVES = ("c10d", "_c10d_functional")
# Operators that are Python around others, each of which is computed.
COMPOSITES: dict[str, Callable[..., Any]] = {"m3i::boltzmann_rows": boltzmann_rows.rows}
# Where an index is a mask, they take the places that it has, which the device would have counted.
PUTS = {aten.index_put, aten.index_put_, aten._index_put_impl_}


def host_alias(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the memory of a tensor on the null device."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    host = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())


def _on_host(value: Any) -> Any:
    """Return what the CPU's operator takes in place of an argument."""
    if isinstance(value, Tensor):
        return host_alias(value) if value.is_cuda else value
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, torch.Generator) and value.device.type == "cuda":
        return torch.default_generator
    return value


class _Captures:
    """The work on the host that stands for what each CUDA graph holds, done at its replays."""

    def __init__(self) -> None:
        self.current: list[Callable[[], None]] | None = None
        """Work of the capture under way; None outside of one."""
        self._of_graph: WeakKeyDictionary[Any, list[Callable[[], None]]] = WeakKeyDictionary()

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the captures and replays of all graphs while the context lasts."""
        graph = torch.cuda.CUDAGraph
        begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay

        def begins(of: Any, *args: Any, **kwargs: Any) -> None:
            begin(of, *args, **kwargs)
            self.current = self._of_graph[of] = []

        def ends(of: Any) -> None:
            self.current = None
            end(of)

        def replays(of: Any) -> None:
            replay(of)
            if not any(isinstance(m, ComputeOnHost) for m in _get_current_dispatch_mode_stack()):
                return  # within `as_launched`
            with _disable_current_modes():
                for work in self._of_graph.get(of, ()):
                    work()

        with (
            mock.patch.object(graph, "capture_begin", begins),
            mock.patch.object(graph, "capture_end", ends),
            mock.patch.object(graph, "replay", replays),
        ):
            yield


class ComputeOnHost(TorchDispatchMode):
    """Computes what is dispatched to CUDA while it is entered, backward passes included.

    computed_by: what computes an operator, by its overload, where it is not the CPU's own kernel.
    It takes the operator's arguments as tensors of the CPU.
    """

    def __init__(self, computed_by: Mapping[Any, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self._computed_by = {**OF_CPU, **(computed_by or {})}
        self._captures = _Captures()
        self._followed: list[contextlib.ExitStack] = []  # a mode may be entered again inside

    def __enter__(self) -> Any:
        stack = contextlib.ExitStack()
        if not self._followed:
            stack.enter_context(self._captures.followed())
        self._followed.append(stack)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._followed.pop().close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if FakeTensor in types:  # a shape that DTensor asks for
            return func(*args, **kwargs)
        if any(t not in (Tensor, torch.nn.Parameter) for t in types):
            return NotImplemented  # a subclass dispatches its parts, which come here
        composite = COMPOSITES.get(func.name())
        if composite is not None:
            with self:
                return composite(*args, **kwargs)
        if self._captures.current is not None:
            return self._captured(func, args, kwargs)
        # Shapes that the device would have counted, and solvers that check what they have computed
        if torch.Tag.dynamic_output_shape in func.tags or "linalg" in func.name():
            return _on_device(self._computed(func, args, kwargs), args, kwargs)
        if func.overloadpacket in PUTS and _has_mask(args[1]):
            values = self._computed(func, args, kwargs)
            return args[0] if func._schema.is_mutable else _on_device(values, args, kwargs)
        out = func(*args, **kwargs)
        if not _is_computed(func, args, kwargs, out):
            return out
        return _filled(out, self._computed(func, args, kwargs))

    def _captured(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Dispatch an operator that a graph holds, and have it computed at each replay."""
        out = func(*args, **kwargs)
        if not _is_computed(func, args, kwargs, out):
            return out
        # Aliases of memory, not tensors: what the capture frees it may use again.
        on_host = self._computed_by.get(func, func)
        own, named, results = (tree_map(_on_host, each) for each in (args, kwargs, out))

        def work() -> None:
            _filled(results, on_host(*own, **named))

        assert self._captures.current is not None
        self._captures.current.append(work)
        return out

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what the operator gives on the host for the same memory."""
        on_host = self._computed_by.get(func, func)
        return on_host(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))


def _is_computed(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Return whether an operator writes numbers to the device that the runtime does not."""
    if func.is_view or func.overloadpacket in NOT_COMPUTED or func.namespace in COLLECTIVES:
        return False
    tensors = [v for v in tree_leaves((args, kwargs, out)) if isinstance(v, Tensor)]
    return any(t.is_cuda for t in tensors)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    return forward(q, k, v, dropout, causal, scale=scale)  # out and logsumexp, as CUDA's first two


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor,
    cum_q: object, cum_k: object, max_q: int, max_k: int, dropout: float, causal: bool,
    seed: object, offset: object, *, scale: float | None = None,
) -> Any:  # fmt: skip
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return backward(grad, q, k, v, out, logsumexp, dropout, causal, scale=scale)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_logsumexp: bool,
    dropout: float = 0.0, causal: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    out, logsumexp = forward(q, k, v, dropout, causal, attn_mask=bias, scale=scale)
    return out, F.pad(logsumexp, (0, -logsumexp.shape[-1] % 32))  # as CUDA's kernel aligns it


def _masked_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor,
    logsumexp: Tensor, seed: object, offset: object, dropout: float, wanted: Sequence[bool],
    causal: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    sums = logsumexp[..., : q.shape[-2]]
    grads = backward(grad, q, k, v, out, sums, dropout, causal, attn_mask=bias, scale=scale)
    if bias is None or not wanted[3]:
        return grads
    return (*grads, _bias_gradient(grad, q, k, v, bias, out, causal, scale))


def _bias_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor,
    causal: bool, scale: float | None,
) -> Tensor:  # fmt: skip
    """Return attention's gradient by its bias, which the CPU's operator does not compute."""
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    centred = grad @ v.mT - (grad * out).sum(-1, keepdim=True)
    return (logits.softmax(-1) * centred).sum_to_size(bias.shape)


# What CUDA alone has, by the operator that the CPU has in its place.
def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _added_wide_product(
    to: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *,
    beta: float = 1, alpha: float = 1, out: Tensor,
) -> Tensor:  # fmt: skip
    return torch.addmm(to, a.to(dtype), b.to(dtype), beta=beta, alpha=alpha, out=out)


def _rows_pass(products: Tensor, *others: Any) -> None:
    """Compute G in the place of the products, and round it, which the CPU's kernel does not."""
    *before, rounded, writes_products = others
    is_rounded = rounded is not None
    m3i.boltzmann_rows_pass.default(products, *before, None, writes_products or is_rounded)
    if is_rounded:
        rounded.copy_(products)


OF_CPU = {
    m3i.boltzmann_rows_pass.default: _rows_pass,
    aten.mm.dtype_out: _wide_product,
    aten.addmm.dtype_out: _added_wide_product,
    aten._scaled_dot_product_flash_attention.default: _attention,
    aten._scaled_dot_product_flash_attention_backward.default: _attention_backward,
    aten._scaled_dot_product_efficient_attention.default: _masked_attention,
    aten._scaled_dot_product_efficient_attention_backward.default: _masked_attention_backward,
}


def _on_device(values: Any, args: Any, kwargs: Any) -> Any:
    """Return computed values on the device of the arguments."""
    of_args = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    device = next((v.device for v in of_args if v.is_cuda), torch.device("cpu"))
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)


def _filled(out: Any, values: Any) -> Any:
    """Return `out` with the computed values in it; the values where they have another shape."""
    if isinstance(out, Tensor) and values is not None:  # None: a gradient that nobody asked for
        if out.shape != values.shape:
            return values.to(out.device)
        (host_alias(out) if out.is_cuda else out).copy_(values)
        return out
    if isinstance(out, (tuple, list)):
        filled = map(_filled, out, values)  # of an operator of the CPU's own, the first ones alone
        return type(out)([*filled, *out[len(values) :]])
    return out


@contextlib.contextmanager
def as_launched() -> Iterator[None]:
    """Leave any mode, so that what is called is dispatched as on a GPU, and computes nothing."""
    with _disable_current_modes():
        yield
