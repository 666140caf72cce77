"""The optimisers of a run: AdamW, LAMB, LARS or Muon, by torch or fused, schedules as arrays."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from m3i_fast.config_fields import check_fields
from m3i_fast.engine.optim.muon import Muon
from m3i_fast.engine.optim.param_groups import Group, group_parameters, lr_scales
from m3i_fast.engine.optim.schedules import cosine, warmup_cosine
from m3i_fast.engine.optim.skippable_step import step_with_skip
from m3i_fast.engine.optim.step_counts import keep_steps_in_state
from m3i_fast.engine.parallel.local_shards import GradientNorm, gradient_norm, local

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    name: Literal["adamw", "lamb", "lars"] = "adamw"
    """The optimiser. lamb and lars, for large batches, scale the step of every tensor that decays
    by its norm; lars is SGD with momentum otherwise, and wants a far larger lr."""
    impl: Literal["auto", "torch", "te", "apex"] = "auto"
    """Whose code: auto is torch's; te is Transformer Engine's FusedAdam, apex NVIDIA Apex's
    FusedAdam or FusedLAMB, each on a GPU where it is installed."""
    lr: float = 1e-3
    """Peak learning rate, for this batch size."""
    final_lr: float = 0.0
    """Learning rate at the last step."""
    warmup_fraction: float = 0.025
    """Share of the steps that warm up linearly (SiameseIM: 40 of 1600 epochs)."""
    weight_decay: float = 0.05
    """Decoupled weight decay (lamb and lars: within the scaled step); none on parameters of one
    dimension or less."""
    final_weight_decay: float = 0.05
    """Weight decay at the last step, reached by a cosine."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's and LAMB's betas (SiameseIM: 0.9, 0.95); the first is LARS's momentum."""
    eps: float | None = None
    """Added to AdamW's and LAMB's root of the second moment; none: 1e-8, and 1e-6 for lamb."""
    layer_decay: float = 1.0
    """Learning rate of an image encoder's layer over that of the next (BEiT); 1: the same."""
    dcn_lr_scale: float = 1.0
    """Learning rate of DCNv3's offset, mask and gate projections over the others' (the official
    InternImage code's DCN_LR_MUL is of offsets and gates, and none by default)."""
    freeze_patch_embed: bool = False
    """Leave the patch embedding as it was drawn (MoCo v3, for stability); InternImage: its stem."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """What updates the weight matrices of Transformer blocks; AdamW updates all else. muon
    orthogonalises their momentum: more is learnt a step, for 15 to 20 small products a matrix."""
    muon_lr: float = 0.02
    """Muon's peak learning rate; it follows lr's schedule."""
    clip_grad_norm: float = 1.0
    """Bound of the global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check_fields(self, "optim.")
        if not self.lr > 0:
            raise ValueError(f"optim.lr: expected > 0, got {self.lr}")
        if not self.muon_lr > 0:
            raise ValueError(f"optim.muon_lr: expected > 0, got {self.muon_lr}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"optim.warmup_fraction: expected 0 to 1, got {self.warmup_fraction}")
        if self.clip_grad_norm < 0:
            raise ValueError(f"optim.clip_grad_norm: expected >= 0, got {self.clip_grad_norm}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: expected 0 <= beta < 1, got {self.betas}")
        if self.eps is not None and not self.eps > 0:
            raise ValueError(f"optim.eps: expected > 0 or none, got {self.eps}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay: expected 0 < decay <= 1, got {self.layer_decay}")
        if not self.dcn_lr_scale > 0:
            raise ValueError(f"optim.dcn_lr_scale: expected > 0, got {self.dcn_lr_scale}")
        self._check_together()

    def _check_together(self) -> None:
        if self.matrices == "muon" and self.name != "adamw":
            raise ValueError(
                f"optim.matrices: expected adamw with optim.name = {self.name}, got muon"
            )
        if (self.name, self.used_impl) not in _BUILDERS:
            found = " or ".join(["auto", *(impl for name, impl in _BUILDERS if name == self.name)])
            raise ValueError(
                f"optim.impl: expected {found} with optim.name = {self.name}, got {self.impl}"
            )
        least = min(self.weight_decay, self.final_weight_decay)
        if (self.name, self.impl) == ("lamb", "apex") and least == 0:
            raise ValueError(
                "optim.weight_decay, optim.final_weight_decay: expected > 0 with optim.name = lamb "
                f"and optim.impl = apex, which adapts only what decays, got {least}"
            )

    @property
    def used_impl(self) -> str:
        """impl, decided."""
        return "torch" if self.impl == "auto" else self.impl

    def warmup_steps(self, num_steps: int) -> int:
        return round(self.warmup_fraction * num_steps)

    def lr_schedule(self, num_steps: int) -> np.ndarray:  # [num_steps] fp64
        warmup_steps = self.warmup_steps(num_steps)
        return warmup_cosine(
            self.lr, num_steps=num_steps, warmup_steps=warmup_steps, final=self.final_lr
        )

    def weight_decay_schedule(self, num_steps: int) -> np.ndarray:  # [num_steps] fp64
        return cosine(self.weight_decay, self.final_weight_decay, num_steps=num_steps)


class Optimizers:
    """One or two optimisers that are stepped, scheduled and saved as one.

    `clips`: the step clips the global gradient norm itself. `counts_on_host`: an optimiser counts
    its steps there, so that one that may be skipped waits for the device.
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
        """If skip is 1, weights, moments and step counts stay bit for bit as they are."""
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
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if set_to_none:  # Apex's own zero_grad does not know the word
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def clip_grad_norm(self, parameters: list[nn.Parameter], bound: float) -> GradientNorm:
        """The gradients' norms, after which no gradient exceeds `bound` (0: any) in a step.

        Of all together, and of each. An optimiser that clips was given its bound when it was built.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = gradient_norm(grads)
        if not self.clips:
            scale = ((bound or math.inf) / (norm.total + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(local(grads), scale)
        return norm


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> Optimizers:
    """What `cfg` names over the trainable parameters, with Muon for matrices where asked.

    Norms, biases, scalars, tokens and tables do not decay. A group's learning rate is the
    schedule's times its `lr_scale`. Raises ValueError where `cfg.impl` cannot run.
    """
    scales = lr_scales(model, layer_decay=cfg.layer_decay, dcn_lr_scale=cfg.dcn_lr_scale)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    _expect_usable(cfg.used_impl, [p for _, p in named])
    muon = cfg.matrices == "muon"
    matrices = [(name, p) for name, p in named if muon and _in_block(name, p)]
    rest = [(name, p) for name, p in named if not (muon and _in_block(name, p))]
    parts: list[torch.optim.Optimizer] = []
    if rest:
        groups = _with_rates(group_parameters(rest, scales), cfg, lr=cfg.lr)
        parts.append(_BUILDERS[cfg.name, cfg.used_impl](cfg, groups))
    if matrices:
        groups = _with_rates(group_parameters(matrices, scales), cfg, lr=cfg.muon_lr)
        parts.append(Muon(groups, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    on_host = cfg.used_impl in _LIBRARIES
    if on_host:
        logger.warning(
            "optim.impl %s: every step waits for the device, to know whether it is to be skipped; "
            "--optim.impl torch does not",
            cfg.impl,
        )
    clips = (cfg.name, cfg.impl) == ("lamb", "apex")
    return Optimizers(*parts, clips=clips, counts_on_host=on_host)


def set_schedules(optimizer: Optimizers, *, lr: float, weight_decay: float) -> None:
    """Write this step's values into the groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = weight_decay


def _in_block(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and ".blocks." in f".{name}"


def _with_rates(groups: list[Group], cfg: OptimConfig, *, lr: float) -> list[Group]:
    """The groups at the peak of the schedule; `lr_scale` becomes relative to cfg.lr."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        group["lr_scale"] *= lr / cfg.lr
        group["weight_decay"] = cfg.weight_decay if group["decays"] else 0.0
    return groups


def _adamw(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    eps = cfg.eps or 1e-8
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=eps, fused=True)


def _lamb(cfg: OptimConfig, groups: list[Group]) -> torch.optim.Optimizer:
    # Its import of DTensor takes half a second of every command, were it at the top.
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

# The module to look for (PyPI's apex is another program of that name) and how to come by it.
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
