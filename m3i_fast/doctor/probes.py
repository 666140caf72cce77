"""Facts about this machine and the libraries installed on it, each gathered in a child process.

    python probes.py NAME      prints one JSON object

An import of a binary library may abort the process or hang; a child can be watched and outlived. At
module level only the standard library: scripts/install.py reads the driver before anything is
installed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

# cuDeviceGetAttribute's numbers for the compute capability, and CUDA's "no device was found".
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _NO_DEVICE = 75, 76, 100


class ProbeError(Exception):
    """A library that is there and does not work; the message is the reason."""


def gather(name: str, *, timeout_s: float = 120.0) -> Facts:
    """Return a probe's facts from a child process.

    Raises ProbeError with the last line that the child wrote, where it fails or gives no answer.
    """
    code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, name]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer in {timeout_s:.0f} s") from None
    last_words = child.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    if child.returncode < 0:
        raise ProbeError(f"killed by signal {-child.returncode}: {last_words[0]}")
    if child.returncode:
        raise ProbeError(last_words[0])
    # Imports may print; the facts are the last line.
    facts: Facts = json.loads(child.stdout.splitlines()[-1])
    return facts


def driver() -> Facts:
    """Return the newest CUDA version of the driver, and its GPUs; where there is none, why."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"reason": "no NVIDIA driver (libcuda.so.1 not found)"}
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    status = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if status == _NO_DEVICE or (status == 0 and count.value == 0):
        return {"reason": "an NVIDIA driver, but no GPU is visible"}
    if status:
        return {"reason": f"the NVIDIA driver does not start (CUDA error {status})"}
    gpus = [_gpu(cuda, index) for index in range(count.value)]
    return {"cuda": [version.value // 1000, version.value % 1000 // 10], "gpus": gpus}


def _gpu(cuda: ctypes.CDLL, index: int) -> Facts:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return {"name": name.value.decode(), "capability": capability}


def torch_build() -> Facts:
    """Return torch's version, the libraries it was built with, and what it reaches here."""
    import torch

    cuda = torch.version.cuda
    return {
        "version": torch.__version__,
        "cuda": cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "flash_attention": ["2", *filter(_has_flash_attention, "34")],
        "sees_gpu": torch.cuda.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "bf16_units": bf16_units(),
    }


def _has_flash_attention(version: str) -> bool:
    """Return whether torch can use this version of FlashAttention; replaces torch's own."""
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl(f"FA{version}")
    except (ImportError, RuntimeError, ValueError):
        return False
    return True


def bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """Return the CPU's instructions for products in bf16, by Linux's names; none without Linux."""
    if not cpuinfo.is_file():
        return None
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    known = {"avx512_bf16", "amx_bf16", "bf16"}
    return sorted(known.intersection(flags[1].split() if flags else ()))


def kernels_cpu() -> Facts:
    """Run each op of _C on a small input, and return their names."""
    return _run_ops("cpu")


def kernels_cuda() -> Facts:
    """Run each op of _C_cuda on the first GPU, and return their names."""
    return _run_ops("cuda")


def _run_ops(device: str) -> Facts:
    from m3i_fast.op_registry import OPS

    if wrong := [op.name for op in OPS if not op.is_right(device)]:
        sys.exit(f"{', '.join(wrong)}: wrong results")
    return {"ops": [op.name for op in OPS]}


def dali() -> Facts:
    """Run a small DALI pipeline on the first GPU, or else the CPU, and return which.

    Also why this package's operators cannot be used there; None: they can.
    """
    from nvidia.dali import fn, pipeline_def

    device_id = 0 if "gpus" in driver() else None

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id)
    def small() -> Any:
        value = fn.random.uniform(range=(0.0, 1.0), shape=(2,), seed=1)
        return value if device_id is None else value.gpu()

    pipeline = small()
    pipeline.build()
    pipeline.run()
    from m3i_fast.pipelines.graph.dali import expect_gpu_operators, load_operators

    try:
        load_operators()
        if device_id is not None:
            expect_gpu_operators()
        missing = None
    except ImportError as error:
        missing = str(error)
    return {"device": "cpu" if device_id is None else "gpu", "missing": missing}


def transformer_engine() -> Facts:
    """Return whether Transformer Engine runs FP8 here, with its own reason where not."""
    import transformer_engine.pytorch as te

    available, reason = te.is_fp8_available(return_reason=True)
    return {"fp8": available, "reason": reason}


def precision() -> Facts:
    """Return the FP8 recipes that run here, and why the others do not; try one product."""
    import torch

    from m3i_fast.costs.gemm_shapes import FP8
    from m3i_fast.engine.precision.arithmetic import capabilities_of, refuse_recipe, resolve_device

    machine = capabilities_of(resolve_device("auto"))
    refused = {recipe: refuse_recipe(machine, recipe) for recipe in FP8}
    if machine.torchao and not refused["fp8_current"]:
        from m3i_fast.models.transformer.float8 import float8_linear

        x, weight = torch.randn(2, 16, 64, device=machine.device).bfloat16().chunk(2)
        product, expected = float8_linear(x, weight[0], None), x @ weight[0].T
        if not (product - expected).norm() < 0.1 * expected.norm():
            sys.exit("torchao: a product in FP8 is wrong")
    return {
        "runs": [recipe for recipe, reason in refused.items() if not reason],
        "refused": {recipe: reason for recipe, reason in refused.items() if reason},
    }


def apex() -> Facts:
    """Return the fused optimisers of NVIDIA's Apex, known by its compiled module.

    PyPI's apex is another program of that name.
    """
    importlib.import_module("amp_C")
    optimizers = importlib.import_module("apex.optimizers")
    if not hasattr(optimizers, "FusedLAMB"):
        sys.exit("apex.optimizers has no FusedLAMB")
    return {"optimizers": [name for name in dir(optimizers) if name.startswith("Fused")]}


def cupy() -> Facts:
    """Return how many devices CuPy reaches, none without a driver, and the NVRTC it uses."""
    import cupy

    runtime = cupy.cuda.runtime
    try:
        devices = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status not in (35, 100):  # cudaErrorInsufficientDriver, cudaErrorNoDevice
            raise
        devices = 0
    nvrtc = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    return {"devices": devices, "runtime": runtime.runtimeGetVersion(), "nvrtc": nvrtc}


def nvml() -> Facts:
    """Return driver version and number of GPUs as NVML has them."""
    import pynvml

    pynvml.nvmlInit()
    return {"driver": pynvml.nvmlSystemGetDriverVersion(), "devices": pynvml.nvmlDeviceGetCount()}


def numa() -> Facts:
    """Return the NUMA nodes, the cores that this process may use, and where auto runs loaders.

    By rank, of one thread each: on each GPU, or else on the CPU with as many ranks as there are
    nodes to use.
    """
    import torch

    from m3i_fast.pipelines import threads

    nodes, allowed = threads.numa_nodes(threads.SYSFS), threads.allowed_cores()
    usable = sum(1 for cores in nodes.values() if cores & allowed)
    gpus = [(i, threads.node_of_gpu(i, threads.SYSFS)) for i in range(torch.cuda.device_count())]
    placements = [
        threads.choose(nodes, allowed, num_threads=1, gpu=gpu, local_rank=rank, ranks_a_node=usable)
        for rank, gpu in enumerate(gpus or [None] * usable)
    ]
    return {
        "nodes": {node: threads.format_cores(cores) for node, cores in nodes.items()},
        "allowed": threads.format_cores(allowed),
        "on_gpu": bool(gpus),
        "reasons": [placement.reason for placement in placements],
        "is_wrong": any(placement.is_wrong for placement in placements),
    }


def fatbin_architectures(module: Path) -> list[str]:
    """Return the GPU code in a compiled module: "sm_80", "sm_90a", "compute_80" (PTX), sorted."""
    return sorted({name for name, _ in _fatbin_entries(module)})


def fatbin_ptx_version(module: Path) -> tuple[int, int] | None:
    """Return the newest PTX ISA in a compiled module, which a driver must know; none: no PTX."""
    versions = [version for name, version in _fatbin_entries(module) if name.startswith("compute")]
    return max(versions, default=None)


def _fatbin_entries(module: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Read the fat binary containers: each piece of code's name, and its format's version.

    A container is a header of magic, version, header size and payload size, then entries of kind
    (1 PTX, 2 cubin), header size, payload size, minor and major version of the format (of PTX: its
    ISA), architecture and flags.
    """
    data = module.read_bytes()
    magic, architecture_specific = struct.pack("<IH", 0xBA55ED50, 1), 1 << 20
    start = data.find(magic)
    while start >= 0:
        header_size, payload = struct.unpack_from("<HQ", data, start + 6)
        entry, end = start + header_size, start + header_size + payload
        while entry < end:
            kind, entry_header, size = struct.unpack_from("<HxxIQ", data, entry)
            minor, major, number = struct.unpack_from("<HHI", data, entry + 24)
            flags = int.from_bytes(data[entry + 40 : entry + 44], "little")
            suffix = "a" if flags & architecture_specific else ""
            yield f"{'sm' if kind == 2 else 'compute'}_{number}{suffix}", (major, minor)
            entry += entry_header + size
        start = data.find(magic, end)


PROBES: dict[str, Callable[[], Facts]] = {
    probe.__name__: probe
    for probe in (
        driver,
        torch_build,
        kernels_cpu,
        kernels_cuda,
        dali,
        transformer_engine,
        precision,
        apex,
        cupy,
        nvml,
        numa,
    )  # fmt: skip
}


def _answer(name: str) -> int:
    """Write a probe's facts for the parent, or why there are none; returns the exit status."""
    try:
        sys.stdout.write(json.dumps(PROBES[name]()) + "\n")
    except SystemExit as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = _answer(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # An autograd thread that still frees what Python holds would abort a process that finalises.
    os._exit(status)
