"""Loads the compiled operators and gives their namespace to the modules beside it."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Arguments that were copied to be contiguous, (op, name), each named once in the log.
_copied: set[tuple[str, str]] = set()

_BUILD_COMMAND = "pip install --no-build-isolation --no-deps -e ."


def _load() -> None:
    """Register schemas and CPU kernels; CUDA kernels where torch has CUDA and they are built."""
    if find_spec("m3i_fast._C") is None:
        raise ImportError(
            f"m3i_fast._C, the compiled operators, is not built: run `{_BUILD_COMMAND}`"
        )
    import_module("m3i_fast._C")
    # A torch without CUDA lacks symbols that _C_cuda needs.
    if torch.version.cuda is not None and find_spec("m3i_fast._C_cuda") is not None:
        import_module("m3i_fast._C_cuda")


_load()

m3i = torch.ops.m3i


def contiguous(op: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of it: the first one of an op's argument is logged."""
    if tensor.is_contiguous():
        return tensor
    if (op, name) not in _copied and not torch.compiler.is_compiling():
        _copied.add((op, name))
        logger.warning("%s: %s is copied at every call, it is not contiguous", op, name)
    return tensor.contiguous()
