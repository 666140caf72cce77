"""The compiled operators' namespace `m3i`, loaded when this module is imported."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

# Arguments that were copied to be contiguous, as (op, name); each is logged once.
_copied: set[tuple[str, str]] = set()

_BUILD_COMMAND = "pip install --no-build-isolation --no-deps -e ."


def _load() -> None:
    """Register schemas and CPU kernels, and the CUDA kernels if built and torch has CUDA."""
    if find_spec("m3i_fast._C") is None:
        raise ImportError(
            f"m3i_fast._C: expected the compiled operators, got none; build them by: "
            f"{_BUILD_COMMAND}"
        )
    import_module("m3i_fast._C")
    # A torch without CUDA lacks symbols that _C_cuda needs.
    if torch.version.cuda is not None and find_spec("m3i_fast._C_cuda") is not None:
        import_module("m3i_fast._C_cuda")


_load()

m3i = torch.ops.m3i


def contiguous(op: str, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, or a contiguous copy; the first copy of an op's argument is logged."""
    if tensor.is_contiguous():
        return tensor
    if (op, name) not in _copied and not torch.compiler.is_compiling():
        _copied.add((op, name))
        logger.warning(
            "%s: %s is not contiguous, so that every call copies it; pass a contiguous one",
            op,
            name,
        )
    return tensor.contiguous()


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError for a tensor with a tangent, which an op without a jvp would drop."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{op}: expected to be differentiated by backward, got a tangent of forward mode "
            "(torch.func.jvp, jacfwd, hessian; torch.autograd.forward_ad), which it has no rule for"
        )
