"""The doctor against this environment, and against broken libraries and drivers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast import op_registry
from m3i_fast.cli import doctor
from m3i_fast.costs.gemm_shapes import FP8
from m3i_fast.doctor import findings, probes
from m3i_fast.doctor.findings import Finding, Machine
from m3i_fast.pipelines import threads
from tests.shared.cuda.driver import build_driver

LIBRARIES = {
    # PyPI's apex, a web toolkit: a package of the same name without NVIDIA's compiled module.
    "apex": ("0.9.10.dev0", ""),
    "transformer_engine": ("2.20.2", "import os; os.abort()"),
    "transformer_engine_torch": ("2.20.2", ""),
    "cupy": ("14.0.0", "print('loading'); raise ImportError('libcublas.so.13: cannot open')"),
    "pynvml": ("13.0.1", ""),
}

OPS = [op.name for op in op_registry.OPS]


DISTRIBUTIONS = {"cupy": "cupy-cuda13x"}  # of another name than their package


def add_library(folder: Path, name: str, release: str, source: str) -> None:
    """An installed distribution with one package."""
    package = folder / name.replace(".", "/")
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    name = DISTRIBUTIONS.get(name, name)
    info = folder / f"{name.replace('.', '_').replace('-', '_')}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


def run_doctor(**environment: str) -> tuple[int, dict[str, Finding]]:
    """Exit status and findings by subject of the doctor in a process of its own."""
    command = [sys.executable, "-m", "m3i_fast.cli", "doctor", "--json"]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    content = json.loads(run.stdout)
    assert content["can_train"] == (run.returncode == 0)
    return run.returncode, {each["subject"]: Finding(**each) for each in content["findings"]}


def test_this_environment() -> None:
    status, found = run_doctor()
    assert status == 0, [each for each in found.values() if each.level == "error"]
    assert found["torch"].detail.startswith(torch.__version__)
    assert found["_C"].level == "ok"
    assert (
        found["_C"].detail
        == "CPU kernels run (mask_mix, dcnv3, boltzmann, gaussian, views, add_layer_norm)"
    )
    assert found["DALI"].level == "ok"
    assert version("nvidia-dali-cuda130") in found["DALI"].detail
    cpu = found["CPU"].detail
    assert torch.backends.cpu.get_cpu_capability() in cpu
    assert ("bf16 units" in cpu) != ("no units for bf16" in cpu)
    assert found["Precision"].detail.startswith("fp32, bf16")
    if not torch.cuda.is_available():
        assert "fp8_current (emulated, for its numbers" in found["Precision"].detail
    assert re.search(r"\d+ devices, NVRTC \d+\.\d+$", found["CuPy"].detail)
    assert found["CuPy"].level == "ok"
    assert found["GPU"].level == ("ok" if torch.cuda.is_available() else "absent")


def test_broken_libraries_are_findings(tmp_path: Path) -> None:
    for name, (release, source) in LIBRARIES.items():
        add_library(tmp_path, name, release, source)
    status, found = run_doctor(PYTHONPATH=str(tmp_path))
    assert status == 0, "optional libraries do not stop training"
    assert found["Apex"].level == "warning"
    assert "0.9.10.dev0 is not NVIDIA's" in found["Apex"].detail
    assert found["Apex"].fix.endswith("uninstall -y apex")
    assert "killed by signal 6" in found["Transformer Engine"].detail
    assert "libcublas.so.13: cannot open" in found["CuPy"].detail
    assert "nvidia-ml-py" in found["NVML"].fix


def test_a_dali_that_does_not_import_stops_training(tmp_path: Path) -> None:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "__init__.py").touch()
    add_library(tmp_path, "nvidia.dali", "2.4.0", "raise OSError('libdali.so: truncated')")
    add_library(tmp_path, "nvidia_dali_cuda120", "2.4.0", "")
    add_library(tmp_path, "transformer_engine", "2.20.2", "")
    add_library(tmp_path, "transformer_engine_torch", "2.19.0", "")
    status, found = run_doctor(PYTHONPATH=str(tmp_path))
    assert status == 1
    assert "these overwrite each other's files" in found["DALI"].detail
    assert found["DALI"].fix.endswith('install "nvidia-dali-cuda130==2.4.*"')
    assert "the versions must be equal" in found["Transformer Engine"].detail
    with pytest.MonkeyPatch.context() as patch, pytest.raises(probes.ProbeError, match="truncated"):
        patch.setenv("PYTHONPATH", str(tmp_path))
        probes.gather("dali")


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_a_gpu_that_nothing_here_can_use(tmp_path: Path) -> None:
    status, found = run_doctor(**build_driver(tmp_path))
    assert status == 1
    assert found["GPU"].detail == "Test GPU (sm_90); the driver runs CUDA 12.4"
    assert (found["torch"].level, found["torch"].fix) == ("error", "make clean install")
    assert "CPU build: a GPU is there" in found["torch"].detail
    assert "the driver runs CUDA 12 only" in found["DALI"].detail
    assert 'nvidia-dali-cuda120==2.4.*"' in found["DALI"].fix
    assert found["CuPy"].fix.endswith("cupy-cuda12x")
    assert found["_C_cuda"].level == "error"


def test_a_probe_that_hangs_is_given_up() -> None:
    with pytest.raises(probes.ProbeError, match="no answer in 0 s"):
        probes.gather("torch_build", timeout_s=0.01)


def test_an_op_that_is_wrong_is_named() -> None:
    assert probes.kernels_cpu() == {"ops": OPS}
    broken = torch.library.Library("m3i", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        broken.impl("dcnv3", lambda x, *_: x.clone(), "CPU", allow_override=True)
    try:
        with pytest.raises(SystemExit, match="^dcnv3: wrong results$"):
            probes.kernels_cpu()
    finally:
        broken._destroy()


def test_architectures_in_a_compiled_module(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source, module = tmp_path / "add.cu", tmp_path / "add.so"
    source.write_text("__global__ void add(float* x) { x[threadIdx.x] += 1; }")
    code = [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    subprocess.run([nvcc, *code, "-shared", "-Xcompiler=-fPIC", source, "-o", module], check=True)
    assert probes.fatbin_architectures(module) == ["compute_80", "sm_80", "sm_90a"]
    # The oracle: what nvcc writes at the head of PTX.
    subprocess.run(
        [nvcc, "-arch=compute_80", "-ptx", source, "-o", tmp_path / "add.ptx"], check=True
    )
    (version,) = re.findall(r"^\.version (\d+)\.(\d+)$", (tmp_path / "add.ptx").read_text(), re.M)
    assert probes.fatbin_ptx_version(module) == tuple(map(int, version))
    subprocess.run([nvcc, code[1], "-shared", "-Xcompiler=-fPIC", source, "-o", module], check=True)
    assert probes.fatbin_ptx_version(module) is None


TWO_NODES = {
    "nodes": {"0": "0-3", "1": "4-7"},
    "allowed": "0-7",
    "on_gpu": True,
    "reasons": ["cores 0-3 of NUMA node 0"] * 2 + ["cores 4-7 of NUMA node 1"] * 2,
    "is_wrong": False,
}


def gpu_node(**changes: Any) -> Machine:
    """An H100 with everything in place, or with one thing changed."""
    fused = {"optimizers": ["FusedAdam", "FusedLAMB"]}
    torch_build = {
        "version": "2.15.0",
        "cuda": "13.2",
        "cudnn": 92600,
        "nccl": "2.30.3",
        "flash_attention": ["2", "3"],
    }
    facts = {
        "driver": {"cuda": [13, 0], "gpus": [{"name": "H100", "capability": [9, 0]}]},
        "torch_build": {
            **torch_build,
            "sees_gpu": True,
            "cpu_capability": "AVX2",
            "num_threads": 8,
            "bf16_units": ["avx512_bf16"],
        },
        "kernels_cpu": {"ops": OPS},
        "kernels_cuda": {"ops": OPS},
        "dali": {"device": "gpu", "missing": None},
        "transformer_engine": {"fp8": True, "reason": ""},
        "precision": {"runs": ["fp8_current"], "refused": {"mxfp8": "too old"}},
        "apex": fused,
        "cupy": {"devices": 1, "runtime": 13000, "nvrtc": "13.0"},
        "nvml": {"driver": "580.95", "devices": 1},
        "numa": TWO_NODES,
    }
    versions = {
        "nvidia-dali-cuda130": "2.4.0", "transformer-engine": "2.20.2", "cupy-cuda13x": "14.0.0",
        "transformer-engine-torch": "2.20.2", "transformer-engine-cu13": "2.20.2",
    }  # fmt: skip
    machine = Machine(
        facts={**facts, **changes.pop("facts", {})},
        failures={},
        versions={**versions, **changes.pop("versions", {})},
        importable=frozenset({"transformer_engine", "amp_C", "apex", "cupy", "pynvml"}),
        cuda_module=("compute_80", "sm_100", "sm_120", "sm_80", "sm_90a"),
        ptx=(9, 2),
    )
    return replace(machine, **changes)


def levels(machine: Machine) -> dict[str, str]:
    found = [finder(machine) for finder in findings.FINDERS]
    return {each.subject: f"{each.level}: {each.detail}" for each in found if each.level != "ok"}


def test_a_complete_gpu_node_has_nothing_to_complain_of() -> None:
    node = gpu_node()
    assert levels(node) == {}
    assert findings.find_cuda_kernels(node).detail.endswith(
        "its kernels run (mask_mix, dcnv3, boltzmann, gaussian, views, add_layer_norm)"
    )


def test_every_precision_is_named_with_a_reason_where_it_is_refused() -> None:
    assert findings.find_precision(gpu_node()).detail == (
        "fp32, bf16, fp8_current; not mxfp8: too old"
    )
    here = probes.precision()
    assert set(here["runs"]) | set(here["refused"]) == set(FP8)
    nothing = {"runs": [], "refused": dict.fromkeys(FP8, "expected sm_89")}
    detail = findings.find_precision(gpu_node(facts={"precision": nothing})).detail
    assert detail == "fp32, bf16; not fp8_current, fp8_delayed, mxfp8, fp8_block: expected sm_89"


def test_a_wrong_product_in_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    from m3i_fast.models.transformer import float8

    right = float8.float8_linear
    monkeypatch.setattr(float8, "float8_linear", lambda *arguments: 1.25 * right(*arguments))
    with pytest.raises(SystemExit, match="^torchao: a product in FP8 is wrong$"):
        probes.precision()


T4 = {"cuda": [13, 0], "gpus": [{"name": "T4", "capability": [7, 5]}]}
A100_OLD_DRIVER = {"cuda": [12, 8], "gpus": [{"name": "A100", "capability": [8, 0]}]}
BLIND_TORCH = {
    "version": "2.15.0",
    "cuda": "13.2",
    "cudnn": 92600,
    "nccl": "2.30.3",
    "flash_attention": ["2", "3"],
}
BLIND_TORCH |= {"sees_gpu": False, "cpu_capability": "AVX2", "num_threads": 8}
BLIND_TORCH |= {"bf16_units": []}


@pytest.mark.parametrize(
    ("changes", "subject", "expected"),
    [
        ({"cuda_module": None}, "_C_cuda", "error: not built, and a GPU is there"),
        (
            {"cuda_module": ("sm_80",), "ptx": None},
            "_C_cuda",
            "error: built for sm_80; H100 is sm_90$",
        ),
        ({"failures": {"kernels_cuda": "bad symbol"}}, "_C_cuda", "error: .*: bad symbol"),
        ({"failures": {"torch_build": "killed"}}, "torch", "error: killed"),
        ({"failures": {"precision": "truncated"}}, "Precision", "warning: no FP8: truncated"),
        ({"versions": {"transformer-engine-cu13": "2.19"}}, "Transformer Engine", ".* be equal"),
        ({"versions": {"cupy-cuda12x": "13.0"}}, "CuPy", "warning: .*expected cupy-cuda13x alone"),
        ({"facts": {"cupy": {"devices": 0, "nvrtc": "13.0"}}}, "CuPy", "warning: .*, 0 devices"),
        ({"facts": {"numa": {**TWO_NODES, "is_wrong": True}}}, "NUMA", "warning: cores by node"),
        ({"failures": {"numa": "truncated"}}, "NUMA", "warning: truncated"),
        ({"facts": {"driver": T4}}, "GPU", "error: .*need sm_80 or newer, T4 is sm_75"),
        (
            {"facts": {"torch_build": BLIND_TORCH, "driver": A100_OLD_DRIVER}},
            "torch",
            "error: .*the driver runs CUDA 12 only, so torch sees no GPU",
        ),
    ],
)
def test_one_thing_wrong_is_named(changes: dict[str, Any], subject: str, expected: str) -> None:
    found = levels(gpu_node(**changes))
    assert re.match(expected, found[subject]), found


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("compute_80", (10, 0), True),
        ("sm_90a", (9, 0), True),
        ("compute_90a", (10, 0), False),
        ("sm_100", (10, 0), True),
    ],
)
def test_which_code_runs_on_which_gpu(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert findings._covers(built, capability) is runs


def card(name: str, *capability: int, cuda: tuple[int, int] = (13, 0)) -> dict[str, Any]:
    return {"driver": {"cuda": list(cuda), "gpus": [{"name": name, "capability": [*capability]}]}}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (card("A100", 8, 0), "ok: .*; A100 takes sm_80; its kernels run"),
        (card("L40S", 8, 9), "ok: .*; L40S takes sm_80; its kernels run"),
        (card("H100", 9, 0), "ok: .*; H100 takes sm_90a; its kernels run"),
        (
            card("B200", 10, 0),
            "ok: .*; B200 takes sm_100, from the kernels of Ampere; its kernels run",
        ),
        (
            card("B300", 10, 3),
            "ok: .*; B300 takes sm_100, from the kernels of Ampere; its kernels run",
        ),
        (
            card("RTX 5090", 12, 0),
            "ok: .*; RTX 5090 takes sm_120, from the kernels of Ampere; its kernels run",
        ),
        (
            card("Thor", 11, 0, cuda=(13, 2)),
            "ok: .*; Thor is sm_110: its driver compiles compute_80 when it loads; its kernels run",
        ),
        (
            card("Thor", 11, 0, cuda=(13, 0)),
            r"error: built for compute_80, sm_100, .* \(PTX 9\.2\); Thor is sm_110: its driver "
            r"compiles compute_80 when it loads, and one of CUDA 13\.0 knows PTX 9\.0 at most: ",
        ),
    ],
)
def test_which_code_a_card_takes_and_whether_its_driver_can(
    facts: dict[str, Any], expected: str
) -> None:
    found = findings.find_cuda_kernels(gpu_node(facts=facts))
    assert re.match(expected, f"{found.level}: {found.detail}"), found
    if found.level == "error":
        assert found.fix == "CUDAARCHS='110-real' make clean install"


def test_a_build_for_the_cards_here_names_each() -> None:
    gpus = [
        {"name": n, "capability": c} for n, c in (("a", [11, 0]), ("b", [9, 0]), ("c", [11, 0]))
    ]
    machine = gpu_node(facts={"driver": {"cuda": [13, 0], "gpus": gpus}})
    assert findings._build_for(machine) == "CUDAARCHS='90a-real;110-real' make clean install"
    built = findings._build_for(replace(machine, in_checkout=False))
    assert built.startswith("CUDAARCHS='90a-real;110-real' python -m pip install ")


@pytest.mark.parametrize(("cuda", "torch"), [(12, "torch>=2.10,<2.11"), (13, "torch>=2.11")])
def test_what_to_type_outside_a_checkout_has_no_makefile(cuda: int, torch: str) -> None:
    gpus = [{"name": "H100", "capability": [9, 0]}]
    facts = {"driver": {"cuda": [cuda, 4], "gpus": gpus}}
    machine = gpu_node(facts=facts, in_checkout=False, cuda_module=None)
    failed = replace(machine, failures={"torch_build": "torch: libcudart.so.12 not found"})
    fixes = [finder(failed).fix for finder in findings.FINDERS]
    assert not [fix for fix in fixes if "make " in fix]
    assert "cmake.define.M3I_CUDA=ON m3i-fast" in findings.find_cuda_kernels(machine).fix
    assert f'install --force-reinstall "{torch}"' in machine.start_over


def test_a_machine_without_dali_trains() -> None:
    machine = gpu_node(versions={"nvidia-dali-cuda130": None})
    machine = replace(machine, versions={n: v for n, v in machine.versions.items() if v})
    found = findings.find_dali(machine)
    assert (found.level, "auto takes torch" in found.detail) == ("warning", True)


@pytest.mark.parametrize(
    ("cuda", "ptx"),
    [
        ((12, 0), (8, 0)),
        ((12, 5), (8, 5)),
        ((12, 6), (8, 5)),
        ((12, 8), (8, 7)),
        ((12, 9), (8, 8)),
        ((13, 0), (9, 0)),
        ((13, 2), (9, 2)),
    ],
)
def test_ptx_that_a_driver_knows(cuda: tuple[int, int], ptx: tuple[int, int]) -> None:
    """The table of releases in NVIDIA's PTX ISA manual."""
    assert findings._ptx_of_driver(cuda) == ptx


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile", ["amx_bf16", "avx512_bf16"]),
        ("Features\t: fp asimd sve bf16 i8mm", ["bf16"]),
        ("flags\t\t: fpu avx2 fma", []),
        ("model name\t: avx512_bf16", []),
    ],
)
def test_units_for_bf16_by_the_flags_of_linux(flags: str, units: list[str], tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert probes.bf16_units(tmp_path / "cpuinfo") == units
    assert probes.bf16_units(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("units", "says"),
    [
        (["avx512_bf16"], "; bf16 units: avx512_bf16"),
        ([], "; no units for bf16, which is far slower than fp32 here"),
        (None, ""),
    ],
)
def test_a_cpu_without_units_for_bf16_is_told(units: list[str] | None, says: str) -> None:
    facts = {**gpu_node().facts["torch_build"], "bf16_units": units}
    detail = findings.find_cpu(gpu_node(facts={"torch_build": facts})).detail
    assert detail == f"vector instructions AVX2, 8 threads{says}"


def test_what_affinity_will_do_is_told_by_gpu() -> None:
    assert findings.find_numa(gpu_node()).detail == (
        "cores by node 0: 0-3, 1: 4-7; this process may use 0-7; data.affinity auto with 4 "
        "ranks, of one thread each: GPU 0, 1: cores 0-3 of NUMA node 0; "
        "GPU 2, 3: cores 4-7 of NUMA node 1"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of ranks without a GPU")
def test_what_affinity_will_do_on_this_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = findings.find_numa(gpu_node(facts={"numa": probes.numa()})).detail
    cores = sorted(os.sched_getaffinity(0))
    assert f"this process may use {threads.format_cores(cores)}; data.affinity auto" in here
    if len(cores) < 2:
        pytest.skip("needs two cores")
    for node, core in enumerate(cores[:2]):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"devices/system/node/node{node}/cpulist").write_text(f"{core}\n")
    monkeypatch.setattr(threads, "SYSFS", tmp_path)
    dealt = findings.find_numa(gpu_node(facts={"numa": probes.numa()})).detail
    assert dealt.endswith(
        f"auto with 2 ranks, of one thread each: rank 0: cores {cores[0]} of NUMA node 0; "
        f"rank 1: cores {cores[1]} of NUMA node 1"
    )


def test_commands_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    fix = 'python -m pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]" ' * 2
    broken = Finding(subject="DALI", level="error", detail="[not] installed", fix=fix.strip())
    doctor.show([broken], can_train=False)
    shown = capsys.readouterr().out
    assert fix.strip() in shown
    assert "[not] installed" in shown
    assert "cannot train" in shown
