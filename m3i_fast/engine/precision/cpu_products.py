"""Matrix products and attention of a training step on a CPU, by the library that is fast on it.

torch multiplies fp32 matrices on x86 by MKL, whose AVX-512 kernels serve Intel's CPUs alone. torch
also has oneDNN, whose AVX-512 kernels serve AMD's as well, and takes it for fp32 matrices where it
may round them to bf16. Only CPUs with AMX have kernels that do round: elsewhere oneDNN multiplies
in fp32, which is tried before it is relied on.

The fused attention of a CPU makes a oneDNN primitive for each of its small products then, and takes
eight times as long as by MKL. So attention is computed by whole products, as it also is in bf16,
where its backward pass has the same fault; its scores [B, H, T, T] are kept for the backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def fast_cpu_products(device: torch.device, compute_dtype: torch.dtype) -> Iterator[None]:
    """Have products and attention computed as is fastest on this CPU; nothing on a GPU.

    Results are those of fp32, or of the bf16 that compute_dtype asks for.
    """
    if device.type != "cpu" or not (by_onednn() or compute_dtype == torch.bfloat16):
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        if not by_onednn():
            yield
            return
        with _onednn_for_fp32():
            yield


@cache
def by_onednn(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether oneDNN's fp32 products are exact and faster than MKL's: on AMD's AVX-512."""
    if not (cpuinfo.is_file() and torch.backends.mkldnn.is_available()):
        return False
    is_amd = re.search(r"^vendor_id\s*:\s*AuthenticAMD", cpuinfo.read_text(), re.MULTILINE)
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return bool(is_amd) and wide and keeps_fp32()


def keeps_fp32() -> bool:
    """Return whether oneDNN multiplies fp32 matrices without rounding them to bf16 here."""
    with _disable_current_modes(), _onednn_for_fp32():  # also where tensors have no data
        beyond_bf16 = torch.full((64, 64), 1 + 2**-12, device="cpu")
        return torch.equal(beyond_bf16 @ torch.eye(64, device="cpu"), beyond_bf16)


@contextmanager
def _onednn_for_fp32() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
