"""CUDA graphs of modules: encoders and decoders are replayed as one launch each.

A graph reads and writes the memory that it was captured with, so each graph serves one call of a
step: calls of one shape within a step have a graph each, which the next step replays once the
backward pass of this one is done. A shape that occurs only once gets no graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from m3i_fast.models.transformer.text_decoder import TextDecoder
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import DenseDecoder

logger = logging.getLogger(__name__)

REPLAYED: dict[type[nn.Module], str] = {
    ViT: "encode",
    TextEncoder: "forward",
    TextDecoder: "forward",
    DenseDecoder: "forward",
}
NUM_WARMUP = 3  # as torch.cuda.make_graphed_callables
MAX_GRAPHS = 16  # of a module: each keeps the activations of its call


class Replayable(Protocol):
    """A captured graph, as `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Launch the captured kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedCall:
    """One captured call: the memory it reads and writes, and the graphs that compute in it."""

    inputs: tuple[Tensor, ...]
    parameters: tuple[nn.Parameter, ...]
    """The module's trained parameters; empty where no gradient is computed."""
    output: Tensor
    grad_output: Tensor | None
    grads: tuple[Tensor | None, ...]
    """Gradients of inputs and parameters; None for those that have none."""
    forward: Replayable
    backward: Replayable | None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Copy the inputs to the captured memory, replay the forward graph, return its output."""
        output: Tensor = _Replay.apply(self, *inputs, *self.parameters)
        return output


# (module, its method, a call's arguments) -> the captured call, in the caller's modes (autocast)
Capture = Callable[[nn.Module, Callable[..., Tensor], tuple[Tensor, ...]], CapturedCall]


class _Replay(torch.autograd.Function):
    """Autograd function that replays the forward and backward graph of a captured call."""

    @staticmethod
    def forward(ctx: Any, graph: CapturedCall, *tensors: Tensor) -> Tensor:
        ctx.graph = graph
        for own, tensor in zip(graph.inputs, tensors, strict=False):
            own.copy_(tensor)
        graph.forward.replay()
        return graph.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph: CapturedCall = ctx.graph
        assert graph.grad_output is not None and graph.backward is not None
        graph.grad_output.copy_(grad)
        graph.backward.replay()
        return None, *(None if g is None else g.detach() for g in graph.grads)


class GraphedMethod:
    """A module's method, replayed once a call of this shape and place in the step was seen."""

    def __init__(self, module: nn.Module, method: Callable[..., Tensor], capture: Capture) -> None:
        self._module, self._method, self._capture = module, method, capture
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, CapturedCall | None] = {}
        self._has_warned = False

    @property
    def ungraphed(self) -> Callable[..., Tensor]:
        """Return the method itself."""
        return self._method

    def begin_step(self) -> None:
        """Begin a step, in which all graphs may be replayed again."""
        self._calls.clear()

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        """Run the call: eagerly at first, captured the second time, replayed from then on."""
        inputs = tuple(x for x in arguments if x is not None)
        given = tuple(x is not None for x in arguments)
        kind = self._kind(inputs, given)
        place = self._calls.get(kind, 0)
        self._calls[kind] = place + 1
        key = (kind, place)
        if key not in self._graphs:
            self._graphs[key] = None
            return self._method(*arguments)
        graph = self._graphs[key]
        if graph is None:
            if self._is_full():
                return self._method(*arguments)
            graph = self._graphs[key] = self._captured(inputs, given)
        return graph(*inputs)

    def _captured(self, inputs: tuple[Tensor, ...], given: tuple[bool, ...]) -> CapturedCall:
        def method(*own: Tensor) -> Tensor:
            rest = iter(own)
            return self._method(*(next(rest) if there else None for there in given))

        trained = tuple(p for p in self._module.parameters() if p.requires_grad)
        with aliased_parameters(self._module):
            graph = self._capture(self._module, method, inputs)
        return replace(graph, parameters=trained if graph.parameters else ())

    def _kind(self, inputs: Sequence[Tensor], given: tuple[bool, ...]) -> tuple[Any, ...]:
        """Return all that the kernels of a call depend on; given: which arguments are not None."""
        device = inputs[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        shapes = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        return shapes, given, torch.is_grad_enabled(), self._module.training, autocast

    def _is_full(self) -> bool:
        full = sum(graph is not None for graph in self._graphs.values()) >= MAX_GRAPHS
        if full and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "cuda_graphs modules: %s has %d graphs already; calls of other shapes are launched "
                "kernel by kernel",
                type(self._module).__name__,
                MAX_GRAPHS,
            )
        return full


@contextmanager
def aliased_parameters(module: nn.Module) -> Iterator[None]:
    """Replace a module's parameters by aliases of the same memory while the context lasts.

    A live autograd graph, of DDP or of an earlier call, holds the nodes that accumulate the
    gradients of the module's own parameters. These belong to the stream that they were created on,
    and torch refuses to run backward through them in a capture.
    """
    places = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if p is not None
    ]
    aliases: dict[nn.Parameter, nn.Parameter] = {}
    for owner, name, p in places:  # shared ones stay shared
        alias = aliases.setdefault(p, nn.Parameter(p.detach(), requires_grad=p.requires_grad))
        owner._parameters[name] = alias
    try:
        yield
    finally:
        for owner, name, p in places:
            owner._parameters[name] = p


def replay_with_graphs(
    forward: nn.Module, device: torch.device, capture: Capture | None = None
) -> None:
    """Replace the encoders' and decoders' methods in a forward pass by replayed ones, in place.

    Each call of `forward` begins a step. Raises ValueError where there is no GPU to capture on.
    """
    if capture is None and device.type != "cuda":
        raise ValueError(f"cuda_graphs: expected a GPU, got {device}; set --cuda-graphs none")
    graphed_methods = []
    for module in forward.modules():
        name = REPLAYED.get(type(module))
        if name is not None:
            graphed = GraphedMethod(module, getattr(module, name), capture or capture_on_gpu)
            module.calls_apart = True  # type: ignore[assignment]
            setattr(module, name, graphed)
            graphed_methods.append(graphed)

    def begin_step(*_: Any) -> None:
        for graphed in graphed_methods:
            graphed.begin_step()

    forward.register_forward_pre_hook(begin_step)


@contextmanager
def without_graphs(forward: nn.Module) -> Iterator[None]:
    """Run the modules' own methods while the context lasts, which captures and counts no call."""
    graphed = [
        (module, name, method)
        for module in forward.modules()
        for name, method in vars(module).items()
        if isinstance(method, GraphedMethod)
    ]
    for module, name, method in graphed:
        setattr(module, name, method.ungraphed)
    try:
        yield
    finally:
        for module, name, method in graphed:
            setattr(module, name, method)


def capture_on_gpu(
    module: nn.Module, method: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> CapturedCall:
    """Capture a call's kernels, forward and backward, after a few warm-up calls.

    Its memory is its own: in a shared pool one graph could overwrite what another keeps for its
    backward pass. Other threads, such as the loader's, go on: only this thread is checked for
    operations that a capture cannot hold.
    """
    device = inputs[0].device
    own = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    trained = tuple(p for p in module.parameters() if p.requires_grad)
    parameters = trained if torch.is_grad_enabled() else ()
    wanted = [x for x in (*own, *parameters) if x.requires_grad and torch.is_grad_enabled()]
    pool = torch.cuda.graph_pool_handle()
    record = partial(torch.cuda.graph, pool=pool, capture_error_mode="thread_local")
    # Without autocast's cache: kernels of a later step would read a cast of this one.
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    uncached = torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False)
    with torch.random.fork_rng([device.index or 0]), uncached:
        _warm_up(method, own, wanted)
        with record(forward := torch.cuda.CUDAGraph()):
            output = method(*own)
        if not wanted:
            return CapturedCall(
                inputs=own,
                parameters=(),
                output=output,
                grad_output=None,
                grads=(),
                forward=forward,
                backward=None,
            )
        grad_output = torch.empty_like(output)
        with record(backward := torch.cuda.CUDAGraph()):
            computed = iter(torch.autograd.grad(output, wanted, grad_output, allow_unused=True))
    grads = tuple(next(computed) if x.requires_grad else None for x in (*own, *parameters))
    return CapturedCall(
        inputs=own,
        parameters=parameters,
        output=output,
        grad_output=grad_output,
        grads=grads,
        forward=forward,
        backward=backward,
    )


def _warm_up(
    method: Callable[..., Tensor], inputs: tuple[Tensor, ...], wanted: Sequence[Tensor]
) -> None:
    """Run the call on a side stream, so that libraries allocate and choose kernels first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARMUP):
            output = method(*inputs)
            if wanted:
                torch.autograd.grad(output, wanted, torch.zeros_like(output), allow_unused=True)
    torch.cuda.current_stream().wait_stream(stream)
