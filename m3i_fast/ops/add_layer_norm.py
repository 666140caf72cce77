"""A branch added to the residual stream, and the layer norm that the next branch begins with.

Legend: [..., D] the stream and its branches, R rows of them, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.ops.library import contiguous, m3i, refuse_forward_mode

MAX_WIDTH = 4096
"""The largest D."""
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> None:
    torch._check(
        x.dtype in _DTYPES,
        lambda: f"x: expected float32, float64, float16 or bfloat16, got {x.dtype}",
    )
    torch._check(
        dtype == x.dtype or (x.dtype == torch.float32 and dtype in _DTYPES[2:]),
        lambda: (
            "dtype: expected that of x, or float16 or bfloat16 beside float32, "
            f"got {dtype} beside {x.dtype}"
        ),
    )
    torch._check(
        x.dim() > 0 and 0 < x.shape[-1] <= MAX_WIDTH,
        lambda: f"x: expected shape [..., D] with 0 < D <= {MAX_WIDTH}, got {list(x.shape)}",
    )
    if branch is None:
        return
    torch._check(
        branch.shape == x.shape and branch.dtype == dtype,
        lambda: (
            f"branch: expected {list(x.shape)} {dtype}, got {list(branch.shape)} {branch.dtype}"
        ),
    )


@torch.library.register_fake("m3i::add_layer_norm")
def _fake(
    x: Tensor,  # [..., D]
    branch: Tensor | None,  # [..., D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [..., D] or [0], [..., D], [R], [R]
    _check(x, branch, dtype)
    total = x.new_empty((0,)) if branch is None else torch.empty_like(x)
    rows = (x.numel() // x.shape[-1],)
    mean, rstd = (x.new_empty(rows, dtype=_accumulator(x.dtype)) for _ in range(2))
    return total, torch.empty_like(x, dtype=dtype), mean, rstd


@torch.library.register_fake("m3i::add_layer_norm_bwd")
def _fake_bwd(
    grad_normed: Tensor,  # [..., D]
    grad_sum: Tensor | None,  # [..., D]
    sum: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    mean: Tensor,  # [R]
    rstd: Tensor,  # [R]
    needs_branch: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [..., D], [..., D] or [0], [D] or [0] twice
    has_own = needs_branch and grad_normed.dtype != sum.dtype
    of_branch = torch.empty_like(grad_normed) if has_own else grad_normed.new_empty((0,))
    of_weight, of_bias = (weight.new_empty(len(weight) * needs_affine) for _ in range(2))
    return torch.empty_like(sum), of_branch, of_weight, of_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, _, _, ctx.dtype = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.has_branch = branch is not None
    ctx.save_for_backward(total if ctx.has_branch else x, weight, mean, rstd)


def _backward(
    ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    needs_branch = ctx.has_branch and ctx.needs_input_grad[1]
    if not ctx.has_branch:
        grad_sum = None  # of an output that is empty
    if grad_normed is None:
        of_branch = None if grad_sum is None or not needs_branch else grad_sum.to(ctx.dtype)
        return grad_sum, of_branch, None, None, None, None
    needs_affine = any(ctx.needs_input_grad[2:4])
    grad, of_branch, of_weight, of_bias = m3i.add_layer_norm_bwd.default(
        grad_normed.contiguous(),
        None if grad_sum is None else grad_sum.contiguous(),
        *ctx.saved_tensors,
        needs_branch,
        needs_affine,
    )
    if needs_branch and ctx.dtype == grad.dtype:
        of_branch = grad
    affine = (of_weight, of_bias) if needs_affine else (None, None)
    return grad, of_branch if needs_branch else None, *affine, None, None


def _backward_twice(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "add_layer_norm: expected to be differentiated once, got a gradient of its gradient; call "
        "backward without create_graph"
    )


torch.library.register_autograd("m3i::add_layer_norm", _backward, setup_context=_setup_context)
torch.library.register_autograd("m3i::add_layer_norm_bwd", _backward_twice)


def add_layer_norm(
    x: Tensor,  # [..., D]
    branch: Tensor | None,  # [..., D]
    weight: Tensor,  # [D] fp32, fp64 for fp64
    bias: Tensor,  # [D] fp32, fp64 for fp64
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # [..., D], [..., D]
    """Return s = x + branch and its layer norm in `dtype`: a pre-norm block's way from sum to sum.

    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    arXiv 1607.06450, equations 3 and 4. s has the dtype of x. Without a branch s is x itself. Mean,
    variance and y are computed in float32 (float64 for float64), of s as it is rounded, and y is
    rounded once: what autocast makes of `F.layer_norm` and the product after it. The gradient by
    the branch has the dtype of the branch.

    One kernel forward; backward one for the gradients by x and the branch, and one for those by
    weight and bias. On the CPU and on CUDA the same bits at every run, eager and compiled. Under
    torch.export it is torch's own expression, which other runtimes know. Differentiable once.

    Args:
        x: float32, float64, float16 or bfloat16; D at most 4,096. A tensor that is not contiguous
            is copied, with a warning in the log.
        branch: shape of x, in `dtype`; None adds nothing.
        weight: of the norm. That of another dtype is cast.
        bias: of the norm, as weight.
        eps: added to the variance, positive.
        dtype: that of x, or float16 or bfloat16 beside float32; None is that of x.

    Raises:
        RuntimeError: an argument is not as described; the message names it, what was expected and
            what was given. Also where a second derivative or one of forward mode is needed.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = _accumulator(x.dtype)
    weight, bias = weight.to(wide), bias.to(wide)
    if torch.compiler.is_exporting():
        total = x if branch is None else x + branch
        return total, F.layer_norm(total.to(wide), weight.shape, weight, bias, eps).to(dtype)
    refuse_forward_mode("add_layer_norm", x, branch, weight, bias)
    x = contiguous("add_layer_norm", "x", x)
    if branch is not None:
        branch = contiguous("add_layer_norm", "branch", branch)
    total, normed, _, _ = m3i.add_layer_norm.default(x, branch, weight, bias, eps, dtype)
    return x if branch is None else total, normed
