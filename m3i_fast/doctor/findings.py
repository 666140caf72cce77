"""What the facts about a machine mean: what is usable, what is not, why, and what to type.

Pure functions from a Machine to a Finding; m3i_fast/cli/doctor.py gathers and shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from m3i_fast.doctor.probes import Facts

Level = Literal["ok", "absent", "warning", "error"]

OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    subject: str
    level: Level
    """ok; absent: optional and not there; warning: there and not usable; error: stops training."""
    detail: str
    fix: str = ""
    """The command to type; empty where nothing needs doing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Everything the findings are drawn from."""

    facts: dict[str, Facts]
    """By probe, of those that answered."""
    failures: dict[str, str]
    """By probe, of those that did not: why."""
    versions: dict[str, str]
    """Of the installed distributions, by lower-case name with dashes."""
    importable: frozenset[str]
    """Which of the optional modules Python finds, without having imported them."""
    cuda_module: tuple[str, ...] | None
    """The architectures inside _C_cuda; None where it is not built."""
    ptx: tuple[int, int] | None = None
    """The version of the PTX inside _C_cuda; None where there is none."""
    pip: str = "python -m pip"
    in_checkout: bool = True
    """Whether the package runs from a checkout, which has a Makefile; False: from a wheel."""

    @property
    def gpus(self) -> list[Facts]:
        return list(self.facts.get("driver", {}).get("gpus", []))

    @property
    def driver_major(self) -> int | None:
        return self.facts["driver"]["cuda"][0] if self.gpus else None

    @property
    def torch_major(self) -> int | None:
        """CUDA major of the torch build; None for a CPU build or a torch that does not import."""
        return _major(self.facts.get("torch_build", {}).get("cuda"))

    @property
    def cuda_major(self) -> int:
        """The one CUDA major that everything here should be of."""
        return self.torch_major or self.cuda_of_driver

    @property
    def rebuild(self) -> str:
        """Return the command that compiles the package again, against the torch that is there."""
        if self.in_checkout:
            return "make install"
        cuda = " --config-settings=cmake.define.M3I_CUDA=ON" if self.gpus else ""
        return (
            f"{self.pip} install --force-reinstall --no-deps --no-build-isolation "
            f"--no-binary m3i-fast{cuda} m3i-fast"
        )

    @property
    def start_over(self) -> str:
        """Return the command that installs another torch, of the CUDA that the driver runs.

        pip keeps a torch that satisfies the requirement, so that .venv is made anew.
        """
        if self.in_checkout:
            return "make clean install"
        torch = "torch>=2.10,<2.11" if self.cuda_of_driver == 12 else "torch>=2.11"
        return f'{self.pip} install --force-reinstall "{torch}"'

    @property
    def cuda_of_driver(self) -> int:
        """Return the newest CUDA major, 13 at most, that the driver runs; 13 without a driver."""
        return min(self.driver_major or 13, 13)


def find_driver(machine: Machine) -> Finding:
    if reason := machine.failures.get("driver"):
        return Finding(subject="GPU", level="error", detail=reason)
    if not machine.gpus:
        reason = machine.facts["driver"]["reason"]
        return Finding(subject="GPU", level="absent", detail=f"{reason}; trains on the CPU")
    names = ", ".join(f"{gpu['name']} ({_sm(gpu)})" for gpu in machine.gpus)
    major, minor = machine.facts["driver"]["cuda"]
    detail = f"{names}; the driver runs CUDA {major}.{minor}"
    if old := [gpu for gpu in machine.gpus if tuple(gpu["capability"]) < OLDEST_CAPABILITY]:
        detail += f"; the kernels need sm_80 or newer, {old[0]['name']} is {_sm(old[0])}"
        return Finding(subject="GPU", level="error", detail=detail)
    return Finding(subject="GPU", level="ok", detail=detail)


def find_torch(machine: Machine) -> Finding:
    if reason := machine.failures.get("torch_build"):
        return Finding(subject="torch", level="error", detail=reason, fix=machine.rebuild)
    facts = machine.facts["torch_build"]
    detail = f"{facts['version']}, CPU build"
    if facts["cuda"]:
        cudnn, nccl = facts["cudnn"], facts["nccl"]
        detail = f"{facts['version']}, CUDA {facts['cuda']}, cuDNN {cudnn}, NCCL {nccl}"
        detail += f", FlashAttention {' and '.join(facts['flash_attention'])}"
    if not machine.gpus or facts["sees_gpu"]:
        return Finding(subject="torch", level="ok", detail=detail)
    if not facts["cuda"]:
        why = "a GPU is there and this build cannot use it"
    elif _above(machine.torch_major, machine.driver_major):
        why = f"the driver runs CUDA {machine.driver_major} only, so torch sees no GPU"
    else:
        why = "torch sees no GPU although the driver does"
    return Finding(
        subject="torch", level="error", detail=f"{detail}: {why}", fix=machine.start_over
    )


def find_cpu(machine: Machine) -> Finding:
    unknown = {"cpu_capability": "unknown", "num_threads": "?", "bf16_units": None}
    facts = machine.facts.get("torch_build", unknown)
    detail = f"vector instructions {facts['cpu_capability']}, {facts['num_threads']} threads"
    units = facts["bf16_units"]
    if units:
        detail += f"; bf16 units: {', '.join(units)}"
    elif units is not None:
        detail += "; no units for bf16, which is far slower than fp32 here"
    return Finding(subject="CPU", level="ok", detail=detail)


def find_cpu_kernels(machine: Machine) -> Finding:
    if reason := machine.failures.get("kernels_cpu"):
        return Finding(subject="_C", level="error", detail=reason, fix=machine.rebuild)
    ops = ", ".join(machine.facts["kernels_cpu"]["ops"])
    return Finding(subject="_C", level="ok", detail=f"CPU kernels run ({ops})")


def find_cuda_kernels(machine: Machine) -> Finding:
    built_for = machine.cuda_module
    if not machine.gpus:
        detail = "not built; only a GPU needs it"
        if built_for is not None:
            loads = "loads" if machine.torch_major else "a CPU build of torch cannot load it"
            detail = f"built for {_built(machine)}; {loads}; only a GPU needs it"
        return Finding(subject="_C_cuda", level="absent", detail=detail)
    if built_for is None:
        detail = "not built, and a GPU is there"
        return Finding(subject="_C_cuda", level="error", detail=detail, fix=machine.rebuild)
    detail = f"built for {_built(machine)}"
    for gpu in _one_of_each(machine.gpus):
        words, fix = _code_of(machine, gpu)
        detail += f"; {gpu['name']} {words}"
        if fix:
            return Finding(subject="_C_cuda", level="error", detail=detail, fix=fix)
    if reason := machine.failures.get("kernels_cuda"):
        return Finding(
            subject="_C_cuda", level="error", detail=f"{detail}: {reason}", fix=machine.rebuild
        )
    ops = ", ".join(machine.facts["kernels_cuda"]["ops"])
    return Finding(subject="_C_cuda", level="ok", detail=f"{detail}; its kernels run ({ops})")


def find_dali(machine: Machine) -> Finding:
    packages = _of(machine, r"nvidia-dali-cuda\d+")
    wanted = f"nvidia-dali-cuda{machine.cuda_major}0"
    fix = f'{machine.pip} install "{wanted}==2.4.*"'
    if not packages:
        detail = "not installed; --data.backend auto takes torch, which is slower"
        return Finding(subject="DALI", level="warning", detail=detail, fix=fix)
    detail = ", ".join(f"{name} {version}" for name, version in packages.items())
    replace = f"{machine.pip} uninstall -y {' '.join(packages)} && {fix}"
    if len(packages) > 1:
        detail += ": these overwrite each other's files"
        return Finding(subject="DALI", level="error", detail=detail, fix=replace)
    major = int(next(iter(packages)).removeprefix("nvidia-dali-cuda")[:2])
    if machine.gpus and _above(major, machine.driver_major):
        detail += f": the driver runs CUDA {machine.driver_major} only"
        return Finding(subject="DALI", level="error", detail=detail, fix=replace)
    if reason := machine.failures.get("dali"):
        return Finding(subject="DALI", level="error", detail=f"{detail}: {reason}", fix=replace)
    if machine.torch_major not in (None, major):
        detail += f": torch is a CUDA {machine.torch_major} build"
        return Finding(subject="DALI", level="warning", detail=detail, fix=replace)
    device, missing = (machine.facts["dali"][name] for name in ("device", "missing"))
    detail += f", a pipeline ran on the {device}"
    if missing:
        detail += f"; --data.backend auto takes torch, which is slower: {missing}"
        return Finding(subject="DALI", level="warning", detail=detail, fix=machine.rebuild)
    return Finding(subject="DALI", level="ok", detail=f"{detail}, with this package's operators")


def find_transformer_engine(machine: Machine) -> Finding:
    subject, major = "Transformer Engine", machine.cuda_major
    wanted = f'"transformer-engine[core_cu{major},pytorch]"'
    fix = f"{machine.pip} install --no-build-isolation {wanted}"
    if "transformer_engine" not in machine.importable:
        return _not_installed(machine, subject, fix, "FP8 and fused blocks")
    packages = _of(machine, r"transformer-engine(-torch|-cu\d+)?")
    detail = ", ".join(f"{name} {version}" for name, version in packages.items())
    replace = f"{machine.pip} uninstall -y {' '.join(packages)} && {fix}"
    if len(set(packages.values())) > 1:
        detail += ": the versions must be equal"
        return Finding(subject=subject, level="warning", detail=detail, fix=replace)
    cores = [int(name[-2:]) for name in packages if re.search(r"-cu\d+$", name)]
    if cores and machine.torch_major not in (None, *cores):
        detail += f": torch is a CUDA {machine.torch_major} build"
        return Finding(subject=subject, level="warning", detail=detail, fix=replace)
    if reason := machine.failures.get("transformer_engine"):
        return Finding(subject=subject, level="warning", detail=f"{detail}: {reason}")
    facts = machine.facts["transformer_engine"]
    fp8 = "FP8 runs" if facts["fp8"] else f"BF16 only: {facts['reason']}"
    return Finding(subject=subject, level="ok", detail=f"{detail}, {fp8}")


def find_precision(machine: Machine) -> Finding:
    """Which `precision` a run may ask for, and of the others why not."""
    if reason := machine.failures.get("precision"):
        return Finding(subject="Precision", level="warning", detail=f"no FP8: {reason}")
    facts = machine.facts["precision"]
    runs = ", ".join(["fp32", "bf16", *facts["runs"]])
    if facts["runs"] and not machine.gpus:
        runs += " (emulated, for its numbers and not for speed)"
    by_reason: dict[str, list[str]] = {}
    for recipe, reason in facts["refused"].items():
        by_reason.setdefault(reason, []).append(recipe)
    refused = (f"; not {', '.join(names)}: {why}" for why, names in by_reason.items())
    return Finding(subject="Precision", level="ok", detail=runs + "".join(refused))


def find_apex(machine: Machine) -> Finding:
    fix = "in a checkout of NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 " + (
        f"{machine.pip} install --no-build-isolation ."
    )
    if "amp_C" in machine.importable:
        if reason := machine.failures.get("apex"):
            return Finding(subject="Apex", level="warning", detail=reason, fix=fix)
        optimizers = ", ".join(machine.facts["apex"]["optimizers"])
        return Finding(subject="Apex", level="ok", detail=optimizers)
    if "apex" in machine.importable:
        version = machine.versions.get("apex", "of unknown version")
        detail = f"apex {version} is not NVIDIA's (it has no amp_C): PyPI's apex is another program"
        return Finding(
            subject="Apex", level="warning", detail=detail, fix=f"{machine.pip} uninstall -y apex"
        )
    return _not_installed(machine, "Apex", fix, "fused LAMB")


def find_cupy(machine: Machine) -> Finding:
    fix = f"{machine.pip} install cupy-cuda{machine.cuda_major}x"
    if "cupy" not in machine.importable:
        return _not_installed(machine, "CuPy", fix, "kNN on the GPU and the sweep of tiles")
    packages = _of(machine, r"cupy(-cuda\d+x)?")
    detail = ", ".join(f"{name} {version}" for name, version in packages.items())
    replace = f"{machine.pip} uninstall -y {' '.join(packages)} && {fix}"
    majors = {_major(name.removeprefix("cupy-cuda").rstrip("x")) for name in packages} - {None}
    must_match = machine.gpus or machine.torch_major  # else it compiles and no more
    if len(packages) > 1 or (majors and must_match and machine.cuda_major not in majors):
        detail += f": expected cupy-cuda{machine.cuda_major}x alone"
        return Finding(subject="CuPy", level="warning", detail=detail, fix=replace)
    if reason := machine.failures.get("cupy"):
        return Finding(subject="CuPy", level="warning", detail=f"{detail}: {reason}")
    facts = machine.facts["cupy"]
    detail += f", {facts['devices']} devices, NVRTC {facts['nvrtc']}"
    level: Level = "warning" if machine.gpus and not facts["devices"] else "ok"
    return Finding(subject="CuPy", level=level, detail=detail)


def find_nvml(machine: Machine) -> Finding:
    fix = f"{machine.pip} install nvidia-ml-py"
    if "pynvml" in machine.versions:
        fix = f"{machine.pip} uninstall -y pynvml && {fix} --force-reinstall"
        detail = f"pynvml {machine.versions['pynvml']} is deprecated; nvidia-ml-py has the module"
        return Finding(subject="NVML", level="warning", detail=detail, fix=fix)
    if "pynvml" not in machine.importable:
        return _not_installed(machine, "NVML", fix, "power, clocks and engine use")
    if reason := machine.failures.get("nvml"):
        level: Level = "warning" if machine.gpus else "absent"
        return Finding(subject="NVML", level=level, detail=reason)
    facts = machine.facts["nvml"]
    detail = f"driver {facts['driver']}, {facts['devices']} GPUs"
    return Finding(subject="NVML", level="ok", detail=detail)


def find_numa(machine: Machine) -> Finding:
    """Which cores loaders get by data.affinity auto."""
    if reason := machine.failures.get("numa"):
        return Finding(subject="NUMA", level="warning", detail=reason)
    facts = machine.facts["numa"]
    nodes = ", ".join(f"{node}: {cores}" for node, cores in facts["nodes"].items())
    detail = f"cores by node {nodes}" if nodes else "the system names no node"
    detail += f"; this process may use {facts['allowed']}; data.affinity auto"
    if len(facts["nodes"]) < 2:
        return Finding(subject="NUMA", level="ok", detail=f"{detail}: left to the system")
    ranks: dict[str, list[str]] = {}
    for rank, reason in enumerate(facts["reasons"]):
        ranks.setdefault(reason, []).append(str(rank))
    what, count = "GPU" if facts["on_gpu"] else "rank", len(facts["reasons"])
    detail += f" with {count} {'ranks' if count > 1 else 'rank'}, of one thread each: "
    detail += "; ".join(f"{what} {', '.join(those)}: {why}" for why, those in ranks.items())
    return Finding(subject="NUMA", level="warning" if facts["is_wrong"] else "ok", detail=detail)


FINDERS = (
    find_cpu, find_numa, find_driver, find_torch, find_cpu_kernels, find_cuda_kernels, find_dali,
    find_transformer_engine, find_precision, find_apex, find_cupy, find_nvml,
)  # fmt: skip


def _not_installed(machine: Machine, subject: str, fix: str, brings: str) -> Finding:
    if not machine.gpus:
        detail = f"not installed; it brings {brings}, on a GPU"
        return Finding(subject=subject, level="absent", detail=detail)
    detail = f"not installed; it brings {brings}"
    return Finding(subject=subject, level="absent", detail=detail, fix=fix)


def _of(machine: Machine, pattern: str) -> dict[str, str]:
    """Return version by name of the installed distributions whose whole name matches."""
    return {name: v for name, v in sorted(machine.versions.items()) if re.fullmatch(pattern, name)}


def _major(version: str | None) -> int | None:
    digits = re.match(r"\d+", version or "")
    return int(digits.group()) if digits else None


def _above(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one > other


def _sm(gpu: Facts) -> str:
    major, minor = gpu["capability"]
    return f"sm_{major}{minor}"


def _built(machine: Machine) -> str:
    names = ", ".join(machine.cuda_module or ())
    return names + (f" (PTX {_dotted(machine.ptx)})" if machine.ptx else "")


def _code_of(machine: Machine, gpu: Facts) -> tuple[str, str]:
    """Say which code of _C_cuda a GPU takes, and what to type where it can take none."""
    usable = [c for c in machine.cuda_module or () if _covers(c, tuple(gpu["capability"]))]
    if not usable:
        return f"is {_sm(gpu)}", _build_anew(machine)
    if own := [code for code in usable if code.startswith("sm_")]:
        newer = gpu["capability"][0] >= 10  # than Hopper, which has kernels of its own
        return f"takes {own[-1]}{', from the kernels of Ampere' if newer else ''}", ""
    cuda = tuple(machine.facts["driver"]["cuda"])
    compiles = f"is {_sm(gpu)}: its driver compiles {usable[-1]} when it loads"
    if machine.ptx is None or machine.ptx <= _ptx_of_driver(cuda):
        return compiles, ""
    known = f"one of CUDA {_dotted(cuda)} knows PTX {_dotted(_ptx_of_driver(cuda))} at most"
    return f"{compiles}, and {known}: update it, or build for the card", _build_for(machine)


def _ptx_of_driver(cuda: tuple[int, ...]) -> tuple[int, int]:
    """Return the newest PTX ISA that a driver knows, by the table in NVIDIA's PTX ISA manual.

    CUDA 13.x has 9.x; 12.0 to 12.5 have 8.0 to 8.5, 12.6 has 8.5 too, 12.7 to 12.9 have 8.6 to 8.8.
    """
    major, minor = cuda
    return major - 4, minor - 1 if major == 12 and minor > 5 else minor


def _build_for(machine: Machine) -> str:
    numbers = sorted({tuple(gpu["capability"]) for gpu in machine.gpus})
    codes = [f"{major}{minor}{'a' if major == 9 else ''}-real" for major, minor in numbers]
    return f"CUDAARCHS='{';'.join(codes)}' {_build_anew(machine)}"


def _build_anew(machine: Machine) -> str:
    """Return the command that builds for other cards; make keeps what is built until a clean."""
    return machine.start_over if machine.in_checkout else machine.rebuild


def _one_of_each(gpus: list[Facts]) -> list[Facts]:
    """One card of each name."""
    return list({gpu["name"]: gpu for gpu in gpus}.values())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _covers(built: str, capability: tuple[int, ...]) -> bool:
    """Whether that code runs on a GPU: sm_90a on 9.0 alone, PTX (compute_80) on newer ones too."""
    kind, number, exact = re.fullmatch(r"(sm|compute)_(\d+)(a?)", built).groups()  # type: ignore[union-attr]
    code, (major, minor) = divmod(int(number), 10), capability
    if exact:
        return code == (major, minor)
    return code <= (major, minor) if kind == "compute" else code[0] == major and code[1] <= minor
