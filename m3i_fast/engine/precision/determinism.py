"""Determinism: the settings that give the same bits at every run, and what they exclude."""

from __future__ import annotations

import os

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig

# cuBLAS, Transformer Engine and NCCL read these when they start. A variable that is not set gets
# its first value; any of its values is accepted.
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring",),
}


def make_deterministic(cfg: TrainConfig, device: torch.device) -> None:
    """Make this process deterministic; call it before the ranks join and the device is used.

    torch then raises RuntimeError where an operation has no deterministic form, and DCNv3 sums its
    gradient in integers; the other compiled ops have one order of summation in any case. The
    attention of cuDNN and torch's memory-efficient attention have no deterministic backward pass,
    so on a GPU flash or plain attention runs. Raises ValueError as `expect_deterministic`.
    """
    expect_deterministic(cfg, device)
    for name, values in _ENVIRONMENT.items():
        os.environ.setdefault(name, values[0])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def expect_deterministic(cfg: TrainConfig, device: torch.device) -> None:
    """Raise ValueError naming the option or environment variable that excludes determinism."""
    for name, values in _ENVIRONMENT.items():
        got = os.environ.get(name)
        if got is not None and got not in values:
            raise ValueError(
                f"--deterministic: expected {name}={' or '.join(values)} or no {name} in the "
                f"environment, got {got}"
            )
    if isinstance(cfg.vision, ViTConfig) and cfg.vision.attention == "cudnn":
        raise ValueError(
            "--deterministic: expected vision.attention auto, flash, fa3, fa4 or math, got cudnn, "
            "whose backward pass is not deterministic"
        )
    local = cfg.data.local_views
    if device.type == "cuda" and isinstance(cfg.vision, ViTConfig) and local is not None:
        if local.size != cfg.vision.image_size:
            raise ValueError(
                "--deterministic: expected no local views of another size with a ViT on a GPU, "
                "where the gradient of its resampled positions is summed in any order; got "
                f"data.local_views.size = {local.size} and vision.image_size = "
                f"{cfg.vision.image_size}; take --data.local-views none, or --device cpu"
            )
