"""Which device and which arithmetic a run uses."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def resolve_device(requested: str) -> torch.device:
    """auto | cpu | cuda -> device. Raises ValueError when a GPU is asked for and there is none."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: expected a GPU for cuda, got none; `m3i-fast doctor` says why, --device cpu "
            "trains without"
        )
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of matrix products. auto is bf16 on a GPU that has it, fp32 elsewhere."""
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bf16" if has_bf16 else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The forward pass's autocast, to `compute_dtype`."""
    low = compute_dtype(precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
