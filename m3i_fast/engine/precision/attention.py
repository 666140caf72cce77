"""The kernels that compute attention in a training step, chosen by `vision.attention`.

Without a choice torch's order differs from card to card and from release to release: on compute
capability 9.x and 10.x torch 2.15 tries cuDNN first, which builds a plan for each new shape and
has no deterministic backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    sdpa_kernel,
)

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import AttentionKernel, ViTConfig
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.precision.cpu_products import fast_cpu_products

_NAMES = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}


@dataclass(frozen=True, slots=True)
class StepAttention:
    """The attention of a training step."""

    kernel: str
    """Kernel that computes the encoder's attention: flash, fa3, fa4, cudnn, efficient, math, or
    `te` if Transformer Engine chooses it."""
    backends: tuple[SDPBackend, ...] = ()
    """Backends that torch may use, the preferred one first. Empty: torch's own choice."""

    def context(self) -> AbstractContextManager[object]:
        """Return the context in which torch uses these backends alone."""
        return sdpa_kernel([*self.backends], set_priority=True) if self.backends else nullcontext()


def choose_attention(
    cfg: TrainConfig, arithmetic: Arithmetic, device: torch.device
) -> StepAttention:
    """Choose the attention of the step that trains `cfg` on this device.

    With `auto` a GPU prefers FlashAttention, and attention with a mask, which FlashAttention does
    not take, runs torch's memory-efficient kernel. Raises ValueError if `vision.attention` names a
    kernel that this device, dtype or head cannot use.
    """
    asked: AttentionKernel = cfg.vision.attention if isinstance(cfg.vision, ViTConfig) else "auto"
    if arithmetic.backend == "te":
        if asked != "auto":
            raise ValueError(
                "vision.attention: expected auto with Transformer Engine, which chooses its kernel "
                f"by NVTE_FLASH_ATTN and NVTE_FUSED_ATTN, got {asked}"
            )
        return StepAttention("te")
    if asked in ("fa3", "fa4"):
        _activate(asked)
    backends = _backends(asked, device)
    of = cfg.vision if isinstance(cfg.vision, ViTConfig) else cfg.text
    q = torch.empty(
        (1, of.num_heads, 16, of.dim // of.num_heads),  # [B, H, T, D / H]
        dtype=arithmetic.compute_dtype,
        device=device,
        requires_grad=True,
    )
    products = fast_cpu_products(device, arithmetic.compute_dtype)
    with products, StepAttention("", backends).context():
        kernel = _NAMES[SDPBackend(torch._fused_sdp_choice(q, q, q))]
    if kernel == "flash" and device.type == "cuda":
        kernel = (current_flash_attention_impl() or kernel).lower()
    if asked not in ("auto", kernel):
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ValueError(
            f"vision.attention: torch {torch.__version__} cannot run {asked} on {where} with heads "
            f"of {q.shape[-1]} features in {q.dtype}, but {kernel}: set --vision.attention auto"
        )
    return StepAttention(kernel, backends)


def _backends(asked: AttentionKernel, device: torch.device) -> tuple[SDPBackend, ...]:
    if asked == "auto" and device.type == "cpu":
        return ()  # `fast_cpu_products` chooses
    if asked == "math":
        return (SDPBackend.MATH,)
    first = SDPBackend.CUDNN_ATTENTION if asked == "cudnn" else SDPBackend.FLASH_ATTENTION
    if torch.are_deterministic_algorithms_enabled():
        return first, SDPBackend.MATH
    return first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


def _activate(asked: AttentionKernel) -> None:
    """Replace torch's FlashAttention 2 by version 3 or 4 in this process."""
    try:
        activate_flash_attention_impl(asked.upper())
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"vision.attention: {asked} needs FlashAttention {asked[-1]} installed, and torch "
            f"{torch.__version__} cannot use it ({error}): install it, or set --vision.attention "
            "auto"
        ) from error
