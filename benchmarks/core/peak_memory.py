"""Peak memory of one call, and what a machine has left."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5)


def measure_peak(function: Callable[[], object], device: str) -> tuple[float, int]:
    """Return the seconds of one call, and the bytes at its peak above those held before it.

    On CUDA those of torch's allocator; on a CPU the process's resident memory, so that threads'
    buffers and libraries count too: best in a fresh process. OSError where Linux's /proc is absent.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _give_back_freed()
        _CLEAR.write_text(_RESET_PEAK)
        before = _read(_STATUS, "VmRSS")
    begun = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _read(_STATUS, "VmHWM")
    return seconds, peak - before


def free_bytes(device: str) -> int:
    """Return the bytes that are free, of the GPU or of main memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _read(Path("/proc/meminfo"), "MemAvailable")


def _give_back_freed() -> None:
    """Memory that was freed but is still resident would be used again, and not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _read(path: Path, field: str) -> int:  # bytes
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path}: expected a line {field}")
