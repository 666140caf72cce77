"""What computes the same as dcnv3: plain torch, torchvision, and the official extensions.

The extensions' arguments are those of OpenGVLab/InternImage (DCNv3 1.1) and OpenGVLab/DCNv4.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.ops.grid_sample import dcnv3_by_grid_sample

KERNEL, POINTS = 3, 9
GEOMETRY: dict[str, Any] = {"kernel_size": KERNEL, "stride": 1, "padding": 1, "dilation": 1}
IMAGES_A_CALL = 256  # of the extensions' kernels; smaller batches are one call

logger = logging.getLogger(__name__)


# ---- torchvision ---------------------------------------------------------------------------------


def torchvision_inputs(x: Tensor, offset: Tensor, mask: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Return inputs in deform_conv2d's layout: channels first, (y, x), points row by row."""
    shape = *x.shape[:3], groups, KERNEL, KERNEL
    offset = offset.view(*shape, 2).flip(-1).permute(0, 3, 5, 4, 6, 1, 2).flatten(1, 4)
    mask = mask.view(shape).permute(0, 3, 5, 4, 1, 2).flatten(1, 3)
    return tuple(tensor.contiguous() for tensor in (x.permute(0, 3, 1, 2), offset, mask))


def by_torchvision(torchvision_ops: ModuleType, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Return torchvision's output, [N, C, H, W], of deform_conv2d's inputs."""
    weight = x.new_ones(x.shape[1], 1, KERNEL, KERNEL)
    out: Tensor = torchvision_ops.deform_conv2d(x, offset, weight, padding=1, mask=mask)
    return out


# ---- The official extensions ---------------------------------------------------------------------


class OfficialDcnv3(torch.autograd.Function):
    """InternImage's DCNv3, release 1.1: the compiled module's two functions."""

    @staticmethod
    def forward(
        ctx: Any, extension: ModuleType, groups: int, x: Tensor, offset: Tensor, mask: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, offset, mask)
        ctx.extension = extension
        ctx.geometry = *_geometry(x, groups), 1.0
        out: Tensor = extension.dcnv3_forward(x, offset, mask, *ctx.geometry, IMAGES_A_CALL, False)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        rest = grad_out.contiguous(), IMAGES_A_CALL, False
        return None, None, *ctx.extension.dcnv3_backward(*ctx.saved_tensors, *ctx.geometry, *rest)


def dcnv4_inputs(x: Tensor, offset: Tensor, mask: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Return offsets and masks in one tensor, group by group, padded to a multiple of 8."""
    shape = *x.shape[:3], groups, -1
    both = torch.cat([offset.reshape(shape), mask.reshape(shape)], dim=-1).flatten(3)
    return x, F.pad(both, (0, -both.shape[-1] % 8))


def by_dcnv4(functions: ModuleType, groups: int, x: Tensor, offset_mask: Tensor) -> Tensor:
    """Return DCNv4's output without its softmax, which is what dcnv3 computes."""
    out: Tensor = functions.DCNv4Function.apply(
        x, offset_mask, *_geometry(x, groups), 1.0, IMAGES_A_CALL, False
    )
    return out


def _geometry(x: Tensor, groups: int) -> tuple[int, ...]:
    """Kernel, stride, padding and dilation, each of height and width, groups, their channels."""
    return *(value for value in GEOMETRY.values() for _ in range(2)), groups, x.shape[-1] // groups


# ---- All of them ---------------------------------------------------------------------------------


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    function: Callable[..., Tensor]
    inputs: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] = lambda *inputs: inputs
    """dcnv3's x, offset and mask in the function's layout."""
    grad: Callable[[Tensor], Tensor] = _same
    """The same of a gradient of the output."""
    out: Callable[[Tensor], Tensor] = _same
    """The function's output in dcnv3's layout."""


@cache
def find(module: str) -> ModuleType | None:
    """Return the module; None, with one line in the log, where it does not import."""
    try:
        return import_module(module)
    except ImportError as error:
        logger.warning("%s left out: %s", module.partition(".")[0], error)
        return None


def others(groups: int) -> dict[str, Other]:
    """Return every other implementation found here, by name."""
    functions = {
        "grid_sample": Other(function=partial(dcnv3_by_grid_sample, **GEOMETRY, groups=groups))
    }
    if module := find("torchvision.ops"):
        functions["torchvision"] = Other(
            function=partial(by_torchvision, module),
            inputs=partial(torchvision_inputs, groups=groups),
            grad=lambda grad: grad.permute(0, 3, 1, 2).contiguous(),
            out=lambda out: out.permute(0, 2, 3, 1),
        )
    if module := find("DCNv3"):
        functions["DCNv3"] = Other(function=partial(OfficialDcnv3.apply, module, groups))
    if module := find("DCNv4.functions"):
        functions["DCNv4"] = Other(
            function=partial(by_dcnv4, module, groups), inputs=partial(dcnv4_inputs, groups=groups)
        )
    return functions
