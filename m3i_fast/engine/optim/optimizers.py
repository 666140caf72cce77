"""The optimisers of a run: AdamW, LAMB, LARS and Muon, in torch or as a library's fused kernels."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.optim.muon import Muon
from m3i_fast.engine.optim.param_groups import Group, group_parameters, lr_scales
from m3i_fast.engine.optim.saved_step_counts import keep_steps_in_state
from m3i_fast.engine.optim.skippable_step import step_with_skip
from m3i_fast.engine.parallel.local_shards import GradientNorm, gradient_norm, local

logger = logging.getLogger(__name__)


class Optimizers:
    """One or two optimisers that are stepped, scheduled and saved as one.

    clips: the step itself clips the global gradient norm. counts_on_host: an optimiser keeps its
    step count on the host, so that a step that may be skipped waits for the device.
    """

    def __init__(
        self, *optimizers: torch.optim.Optimizer, clips: bool = False, counts_on_host: bool = False
    ) -> None:
        self.optimizers, self.clips = optimizers, clips
        self._counts_on_host = counts_on_host
        self.state: defaultdict[torch.Tensor, Any] = optimizers[0].state
        for optimizer in optimizers[1:]:
            optimizer.state = self.state
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def step(self, skip: Tensor | None = None) -> None:  # [] fp32
        """Take a step; where skip is 1, weights, moments and step counts keep their bits."""
        if skip is not None and self._counts_on_host:
            if skip:
                return
            skip = None
        for optimizer in self.optimizers:
            if skip is None:
                optimizer.step()
            else:
                step_with_skip(optimizer, skip)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, or set them to zero."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if set_to_none:  # Apex's own zero_grad lacks this argument
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def clip_grad_norm(self, parameters: list[nn.Parameter], bound: float) -> GradientNorm:
        """Scale gradients to a global norm of at most `bound` (0: unbounded); return the norms.

        The norms are those before the scaling, of all gradients together and of each. An optimiser
        that clips by itself was given its bound when it was built.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = gradient_norm(grads)
        if not self.clips:
            scale = ((bound or math.inf) / (norm.total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(local(grads), scale)
        return norm


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> Optimizers:
    """Build the optimiser that `cfg` names over the trainable parameters, with Muon if set.

    Norms, biases, scalars, tokens and tables do not decay. The learning rate of a group is the
    schedule's times its `lr_scale`. Raises ValueError where `cfg.impl` cannot run here.
    """
    scales = lr_scales(model, layer_decay=cfg.layer_decay, dcn_lr_scale=cfg.dcn_lr_scale)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    _expect_usable(cfg.used_impl, [p for _, p in named])
    muon = cfg.matrices == "muon"
    matrices = [(name, p) for name, p in named if muon and _in_block(name, p)]
    others = [(name, p) for name, p in named if not (muon and _in_block(name, p))]
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        groups = _with_rates(group_parameters(others, scales), cfg, lr=cfg.lr)
        optimizers.append(_BUILDERS[cfg.name, cfg.used_impl](cfg, groups))
    if matrices:
        groups = _with_rates(group_parameters(matrices, scales), cfg, lr=cfg.muon_lr)
        optimizers.append(Muon(groups, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    on_host = cfg.used_impl in _LIBRARIES
    if on_host:
        logger.warning(
            "optim.impl %s: every step waits for the device to know whether it is skipped; "
            "--optim.impl torch does not wait",
            cfg.impl,
        )
    clips = (cfg.name, cfg.impl) == ("lamb", "apex")
    return Optimizers(*optimizers, clips=clips, counts_on_host=on_host)


def set_schedules(optimizer: Optimizers, *, lr: float, weight_decay: float) -> None:
    """Write the learning rate and weight decay of this step into the groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = weight_decay


def _in_block(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and ".blocks." in f".{name}"


def _with_rates(groups: list[Group], cfg: OptimConfig, *, lr: float) -> list[Group]:
    """Set the groups to the peak of the schedule; `lr_scale` becomes relative to cfg.lr."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        group["lr_scale"] *= lr / cfg.lr
        group["weight_decay"] = cfg.weight_decay if group["decays"] else 0.0
    return groups


def _adamw(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    eps = cfg.eps or 1e-8
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=eps, fused=True)


def _lamb(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    # At the top, its import of DTensor would cost every command half a second.
    from m3i_fast.engine.optim.layerwise import Lamb

    return Lamb(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps or 1e-6)


def _lars(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    from m3i_fast.engine.optim.layerwise import Lars

    return Lars(groups, lr=cfg.lr, momentum=cfg.betas[0])


def _te_adamw(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return _fused_adamw(FusedAdam, cfg, groups)


def _apex_adamw(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return _fused_adamw(FusedAdam, cfg, groups)


def _fused_adamw(kind: Any, cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    optimizer = kind(
        groups,
        lr=cfg.lr,
        bias_correction=True,
        betas=cfg.betas,
        eps=cfg.eps or 1e-8,
        adam_w_mode=True,
        weight_decay=cfg.weight_decay,
    )
    return keep_steps_in_state(optimizer)


def _apex_lamb(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedLAMB

    optimizer = FusedLAMB(
        groups,
        lr=cfg.lr,
        bias_correction=True,
        betas=cfg.betas,
        eps=cfg.eps or 1e-6,
        weight_decay=cfg.weight_decay,
        adam_w_mode=True,
        grad_averaging=True,
        max_grad_norm=cfg.clip_grad_norm or math.inf,  # its 0 would divide by 0
        use_nvlamb=False,  # what does not decay is not adapted
    )
    return keep_steps_in_state(optimizer)


_BUILDERS: dict[tuple[str, str], Callable[[OptimConfig, list[Group]], torch.optim.Optimizer]] = {
    ("adamw", "torch"): _adamw,
    ("adamw", "te"): _te_adamw,
    ("adamw", "apex"): _apex_adamw,
    ("lamb", "torch"): _lamb,
    ("lamb", "apex"): _apex_lamb,
    ("lars", "torch"): _lars,
}

# The module to look for (PyPI's apex is another program of that name) and how to install it.
_LIBRARIES = {
    "te": (
        "transformer_engine",
        'Transformer Engine: pip install --no-build-isolation "transformer-engine[pytorch]"',
    ),
    "apex": (
        "amp_C",
        "NVIDIA's Apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation . in a "
        "checkout of NVIDIA/apex",
    ),
}


def _expect_usable(impl: str, parameters: list[nn.Parameter]) -> None:
    if impl not in _LIBRARIES:
        return
    module, how = _LIBRARIES[impl]
    missing: list[str] = []
    devices = sorted({p.device.type for p in parameters} - {"cuda"})
    if devices:
        missing.append(f"a GPU, where the model is on {', '.join(devices)}")
    if importlib.util.find_spec(module) is None:
        missing.append(how)
    if impl == "apex" and any(type(p.data) is not Tensor for p in parameters):
        missing.append("whole parameters, where these are sharded")
    if missing:
        raise ValueError(
            f"optim.impl: {impl} needs {'; and '.join(missing)}. `m3i-fast doctor` says more; "
            "--optim.impl torch runs anywhere"
        )
