"""The Gaussian likelihood of dense targets: normalise, subtract, square and average in one pass.

Legend: [..., D] predictions and targets, R rows of them, D feature width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.ops.library import contiguous, m3i, refuse_forward_mode

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_options(sigma: float, eps: float, decorrelation_weight: float) -> None:
    for name, value in (("sigma", sigma), ("eps", eps)):
        torch._check(
            value > 0 and math.isfinite(value),
            lambda name=name, value=value: f"{name}: expected a finite value > 0, got {value}",
        )
    torch._check(
        math.isfinite(decorrelation_weight),
        lambda: f"decorrelation_weight: expected a finite value, got {decorrelation_weight}",
    )


def _check_tensors(z_hat: Tensor, z: Tensor) -> None:
    for name, tensor in (("z_hat", z_hat), ("z", z)):
        torch._check(
            tensor.dtype in _DTYPES,
            lambda name=name, tensor=tensor: (
                f"{name}: expected dtype float32, float64, float16 or bfloat16, got {tensor.dtype}"
            ),
        )
    torch._check(
        z_hat.dim() > 0 and z_hat.shape[-1] > 0,
        lambda: f"z_hat: expected shape [..., D] with D > 0, got {list(z_hat.shape)}",
    )
    torch._check(
        (z_hat.dtype == torch.float64) == (z.dtype == torch.float64),
        lambda: f"z: expected float64 beside float64 alone, got {z.dtype} beside {z_hat.dtype}",
    )
    torch._check(
        z.shape == z_hat.shape,
        lambda: f"z: expected shape {list(z_hat.shape)}, got {list(z.shape)}",
    )
    torch._check(
        z.device == z_hat.device,
        lambda: f"z: expected on the device of z_hat ({z_hat.device}), got {z.device}",
    )


@torch.library.register_fake("m3i::gaussian")
def _fake(
    z_hat: Tensor,  # [..., D]
    z: Tensor,  # [..., D]
    sigma: float,
    normalise: bool,
    eps: float,
    decorrelation_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [], [R], [R], [D, D]; [0] where not needed
    _check_tensors(z_hat, z)
    _check_options(sigma, eps, decorrelation_weight)
    width = z_hat.shape[-1]
    rows = z_hat.numel() // width if normalise else 0
    dtype = torch.float64 if z_hat.dtype == torch.float64 else torch.float32
    value, mean, rstd = (z_hat.new_empty(shape, dtype=dtype) for shape in ((), (rows,), (rows,)))
    covariance = z_hat.new_empty((width, width) if decorrelation_weight else (0,))
    return value, mean, rstd, covariance


@torch.library.register_fake("m3i::gaussian_bwd")
def _fake_bwd(
    grad_out: Tensor,  # []
    z_hat: Tensor,  # [..., D]
    z: Tensor,  # [..., D]
    mean: Tensor,  # [R]
    rstd: Tensor,  # [R]
    covariance: Tensor,  # [D, D]
    sigma: float,
    normalise: bool,
    eps: float,
    decorrelation_weight: float,
) -> Tensor:  # [..., D]
    return torch.empty_like(z_hat)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z_hat, z, *ctx.options = inputs
    _, mean, rstd, covariance = output
    ctx.mark_non_differentiable(mean, rstd, covariance)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z_hat, z, mean, rstd, covariance)


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad = None
    if grad_out is not None and ctx.needs_input_grad[0]:
        grad = m3i.gaussian_bwd.default(grad_out, *ctx.saved_tensors, *ctx.options)
    return grad, None, *(None for _ in ctx.options)


def _backward_twice(ctx: Any, *grads: Tensor) -> None:
    # torch's once_differentiable refuses it likewise.
    raise RuntimeError(
        "gaussian: expected to be differentiated once, got a gradient of its gradient; call "
        "backward without create_graph"
    )


torch.library.register_autograd("m3i::gaussian", _backward, setup_context=_setup_context)
torch.library.register_autograd("m3i::gaussian_bwd", _backward_twice)


def gaussian(
    z_hat: Tensor,  # [..., D]
    z: Tensor,  # [..., D] no gradient
    *,
    sigma: float = 1.0,
    normalise: bool = False,
    eps: float = 1e-5,
    decorrelation_weight: float = 0.0,
    centred: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Compute -log N(t; z_hat, sigma^2 I) a dimension, without its constant, for dense terms.

    mean of (t - z_hat)^2 / (2 sigma^2)  +  decorrelation_weight * mean_r(p_r^T C p_r) / D

    M3I, arXiv 2211.09807, section 3, the L2 norm of figure 1. The targets t are z, or with
    `normalise` (z - mean) / sqrt(var + eps) of each row, a layer norm without affine. The second
    term is SiameseIM's entropy regulariser: p_r are the R rows of z_hat and C = mean_r t_r t_r^T.
    With `centred` C is the covariance of the targets, less m m^T of their mean m, so that what all
    targets have in common is predicted at no cost.

    Computed in float32 (float64 for float64); z_hat and z are read once, and once more by the
    gradient, without a wider copy. The gradient is in the dtype of z_hat. The regulariser's matrix
    products are torch's own, with a [D, D] result in float32: on CUDA as
    `torch.backends.cuda.matmul` sets, on the CPU with half types widened block by block. For them t
    is rounded to the dtype of z, and C, for the gradient, to that of z_hat.

    Without decorrelation value and gradient have the same bits at every run, on the CPU for any
    number of threads. Without any row the value is 0, where torch's mse_loss is NaN. Values that
    are not finite stay so. Differentiable once, by z_hat. Autocast does not cast the tensors.

    Args:
        z_hat: float32, float64, float16 or bfloat16. A tensor that is not contiguous is copied,
            with a warning in the log.
        z: any of these dtypes, but float64 if and only if z_hat is; shape and device of z_hat.
        sigma: standard deviation, positive.
        normalise: layer-normalise z.
        eps: added to the variance, positive.
        decorrelation_weight: factor of the second term; 0 leaves it out.
        centred: let C be the covariance. m is summed in the dtype of z.
        process_group: C and m are means over the rows of all its ranks, each of which has to pass
            the same number of rows; the value is that of this rank's rows. The product p C is then
            saved for the backward pass.

    Raises:
        RuntimeError: an argument is not as described; the message names it, what was expected and
            what was given. Also where a second derivative or one of forward mode is needed.
        ValueError: z requires a gradient.
    """
    if z.requires_grad:
        raise ValueError("z: expected a target without gradient, got requires_grad; detach it")
    refuse_forward_mode("gaussian", z_hat, z)
    z_hat, z = contiguous("gaussian", "z_hat", z_hat), contiguous("gaussian", "z", z)
    options = sigma, normalise, eps
    if process_group is None or not decorrelation_weight:
        value, mean, rstd, _ = m3i.gaussian.default(z_hat, z, *options, decorrelation_weight)
    else:
        value, mean, rstd = _of_all_ranks(z_hat, z, options, decorrelation_weight, process_group)
    if centred and decorrelation_weight and z_hat.numel():
        of_mean = _of_mean_target(z_hat, z, (mean, rstd) if normalise else None, process_group)
        value = value - decorrelation_weight / z_hat.numel() * of_mean
    return value


def _of_all_ranks(
    z_hat: Tensor,
    z: Tensor,
    options: tuple[float, bool, float],
    decorrelation_weight: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:  # [], [R], [R]
    """Return the value with the C of all ranks' targets, and this rank's row means and 1 / std."""
    with torch.no_grad():
        covariance = m3i.gaussian.default(z_hat, z, *options, decorrelation_weight)[3]
    covariance = _mean_over_ranks(covariance, group).to(z_hat.dtype)
    fit, mean, rstd, _ = m3i.gaussian.default(z_hat, z, *options, 0.0)
    rows = z_hat.flatten(0, -2)
    if not len(rows):
        return fit, mean, rstd
    spread = (rows @ covariance).to(fit.dtype).mul(rows).sum()
    return fit + decorrelation_weight / rows.numel() * spread, mean, rstd


def _of_mean_target(
    z_hat: Tensor,
    z: Tensor,
    norms: tuple[Tensor, Tensor] | None,  # mean [R] and 1 / std [R] of each row of z
    group: dist.ProcessGroup | None,
) -> Tensor:  # [] fp32, fp64 for fp64
    """Compute sum_r (p_r^T m)^2 with the mean target m, of all ranks of `group`."""
    rows = z.flatten(0, -2)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    if norms is None:
        total = rows.sum(0, dtype=wide)
    else:
        mean, rstd = norms
        # Not `rows * rstd`, which would be a float32 copy of the targets.
        total = (rstd.to(rows.dtype) @ rows).to(wide) - (rstd * mean).sum()
    mean_target = total / len(rows)
    if group is not None:
        mean_target = _mean_over_ranks(mean_target, group)
    along = z_hat.flatten(0, -2) @ mean_target.to(z_hat.dtype)
    return along.to(mean_target.dtype).square().sum()


def _mean_over_ranks(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce by the mean, in float32 at least."""
    wide = own.clone() if own.dtype in (torch.float32, torch.float64) else own.float()
    dist.all_reduce(wide, group=group)
    return wide / dist.get_world_size(group)
