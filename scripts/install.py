"""Make .venv and install m3i-fast into it, with torch, DALI and nvcc of one CUDA major.

    python scripts/install.py          runs in `make install`; a second run rebuilds what changed

The version of the NVIDIA driver selects CUDA 13, CUDA 12, or none. Standard library only and Python
3.10 or newer, since nothing is installed yet when this runs. M3I_CUDA=ON or OFF in the environment
overrules whether the CUDA kernels are built.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"

# The toolkit that the kernels' budgets were measured with; used with a CPU build of torch.
TESTED_CUDA = "13.0"

# What the package is built with, beside torch.
BUILD_WITH = ("scikit-build-core", "cmake", "ninja", "numpy", "nvidia-nvtx")

# Packages that fix the version of torch, so that pip has to resolve them together with it.
WANT_ONE_TORCH = ("torchvision", "open_clip_torch")


@dataclass(frozen=True)
class Plan:
    """The packages to install on this machine, and the reason in one line."""

    reason: str
    cuda_major: int  # of torch, DALI and nvcc
    torch: str  # pip requirement
    extras: tuple[str, ...]
    build_cuda: bool


def plan_for(driver_cuda: tuple[int, int] | None) -> Plan:
    """Plan for the CUDA version that the driver supports; None without driver or GPU.

    A driver runs every program of its own CUDA major and of older ones, so 14 takes the CUDA 13
    builds. Raises ValueError for CUDA 11 and older, which no torch with the stable ABI supports.
    """
    common = ("fp8", "eval", "docs", "dev")
    if driver_cuda is None:
        # The newest that the tests passed with on a CPU; a newer one would come as its CUDA build.
        torch = "torch>=2.10,<2.14"
        return Plan("no GPU seen", 13, torch, ("data", "cupy", *common), build_cuda=False)
    major, minor = driver_cuda
    reason = f"GPU seen, its driver runs CUDA {major}.{minor}"
    if major >= 13:
        extras = ("data", "cupy", "telemetry", *common)
        return Plan(reason, 13, "torch>=2.11", extras, build_cuda=True)
    if major == 12:
        # The last torch that PyPI serves with CUDA 12; 2.11 and newer are CUDA 13 builds.
        torch = "torch>=2.10,<2.11"
        extras = ("data-cu12", "cupy-cu12", "telemetry", *common)
        return Plan(reason, 12, torch, extras, build_cuda=True)
    raise ValueError(f"NVIDIA driver: expected CUDA 12 or newer, got {major}.{minor}; update it")


def overruled(plan: Plan, m3i_cuda: str) -> Plan:
    """Apply the environment's M3I_CUDA to a plan; ValueError unless AUTO, ON, OFF or empty."""
    if m3i_cuda not in ("", "AUTO", "ON", "OFF"):
        raise ValueError(f"M3I_CUDA: expected AUTO, ON or OFF, got {m3i_cuda!r}")
    if m3i_cuda in ("", "AUTO"):
        return plan
    return replace(plan, build_cuda=m3i_cuda == "ON")


def nvcc_requirement(torch_cuda: str | None) -> str:
    """Return the pip requirement of nvcc and headers for the CUDA 13 of torch's build."""
    return f"cuda-toolkit[nvcc,nvrtc,cudart,cccl]=={torch_cuda or TESTED_CUDA}.*"


def requirements(extras: Iterable[str]) -> list[str]:
    """Return the pip requirements of the package with extras, as pyproject.toml lists them."""
    text = (ROOT / "pyproject.toml").read_text()
    text = text[text.index("\ndependencies = ") : text.index("\n[project.scripts]")]
    # TOML's lists of strings read as Python's; tomllib needs Python 3.11.
    lists = re.findall(r"^([\w-]+) = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    rows_of = {name: ast.literal_eval(rows) for name, rows in lists}

    def expanded(name: str) -> Iterator[str]:
        for row in rows_of[name]:
            if own := re.fullmatch(r"m3i-fast\[(.+)\]", row):
                for extra in own[1].split(","):
                    yield from expanded(extra)
            else:
                yield row

    return [row for name in ("dependencies", *extras) for row in expanded(name)]


def nvcc_major(version_text: str) -> int:
    """Read the CUDA major, such as 13, from the output of `nvcc --version`; 0 without one."""
    release = re.search(r"release (\d+)\.\d+", version_text)
    return int(release.group(1)) if release else 0


def run(*command: str | Path, compiles: bool = False) -> None:
    """Run a command, print it and its time, and exit with its status if it fails.

    compiles: show how many objects of ninja are done in place of the command's output, and the end
    of that output if it fails.
    """
    print("+", *(str(part).replace(f"{ROOT}/", "") for part in command), flush=True)
    start, output = time.monotonic(), deque[str](maxlen=100)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if compiles else {}
    words = [str(part) for part in command]
    with subprocess.Popen(words, cwd=ROOT, text=True, errors="replace", **pipes) as process:
        for line in process.stdout or ():
            output.append(line)
            if done := re.match(r"\s*\[(\d+)/(\d+)\] ", line):
                end = "\r" if sys.stdout.isatty() and done[1] != done[2] else "\n"
                seconds = time.monotonic() - start
                print(f"  {done[1]} of {done[2]} objects, {seconds:.0f} s", end=end, flush=True)
    if process.returncode:
        sys.stdout.writelines(output)
        sys.exit(process.returncode)
    print(f"  {time.monotonic() - start:.0f} s", flush=True)


def pip_install(*arguments: str, compiles: bool = False) -> None:
    """Install by pip into the venv, with the tested versions as constraints.

    Python compiles a package's modules when it first imports them: most are never imported.
    """
    run(PYTHON, "-m", "pip", "install", "--verbose" if compiles else "--quiet",
        "--disable-pip-version-check", "--no-compile", "--constraint", "constraints.txt",
        *arguments, compiles=compiles)  # fmt: skip


def installed_torch() -> tuple[str, str | None]:
    """Return the version of torch in the venv and its CUDA version ("13.0"; None: CPU build).

    The version is the package's: what torch says of itself may name its CUDA, such as 2.15.0+cu132
    of a package 2.15.0, and pip knows no such release.
    """
    code = (
        "from importlib.metadata import version; import torch; "
        "print(version('torch'), torch.version.cuda or '')"
    )
    version, *cuda = subprocess.check_output([str(PYTHON), "-c", code], text=True).split()
    return version, cuda[0] if cuda else None


def expect_torch_of(cuda_major: int, chosen: str) -> None:
    """Exit unless torch is still the chosen version, and no build for another CUDA major."""
    version, cuda = installed_torch()
    if version != chosen or (cuda and int(cuda.split(".")[0]) != cuda_major):
        sys.exit(
            f"torch: expected {chosen} of CUDA {cuda_major}, as DALI and nvcc are, got {version} "
            f"of CUDA {cuda}. `make clean install` starts over; with a line `torch=={chosen}` in "
            "constraints.txt pip names the package that needs another one."
        )


def find_nvcc(cuda_major: int) -> Path | None:
    """Find an nvcc of a CUDA major: in the venv, $CUDACXX, the PATH, or /usr/local."""
    own_wrapper = VENV / "bin" / "nvcc"
    on_path = [Path(folder) / "nvcc" for folder in os.get_exec_path()]
    candidates = [
        *sorted(VENV.glob("lib/python*/site-packages/nvidia/cu*/bin/nvcc")),
        Path(os.environ.get("CUDACXX", "/nonexistent")),
        *(path for path in on_path if path != own_wrapper),
        *sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True),
    ]
    for nvcc in filter(Path.is_file, candidates):
        shown = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
        if nvcc_major(shown.stdout) == cuda_major:
            return nvcc
    return None


def complete_toolkit(toolkit: Path) -> None:
    """Link the two names that nvcc and CMake look for and that PyPI's wheels lack."""
    for link, target in (("lib64", "lib"), ("lib/libcudart.so", "libcudart.so.13")):
        if not (toolkit / link).exists():
            (toolkit / link).symlink_to(target)


def install_nvcc(plan: Plan) -> None:
    """Put an nvcc of the plan's CUDA major into .venv/bin, where CMake and the tests find it."""
    if plan.cuda_major == 13:
        # `bench sass` and tests read machine code; newer tools read the code of an older nvcc.
        _, torch_cuda = installed_torch()
        readers = ("nvidia-cuda-nvdisasm>=13", "nvidia-cuda-cuobjdump>=13")
        pip_install(nvcc_requirement(torch_cuda), *readers)
        for toolkit in VENV.glob("lib/python*/site-packages/nvidia/cu13"):
            complete_toolkit(toolkit)
    nvcc = find_nvcc(plan.cuda_major)
    if nvcc is None and plan.build_cuda:
        # PyPI's nvidia-cuda-nvcc-cu12 has ptxas but no nvcc.
        sys.exit(
            f"nvcc: expected one of CUDA {plan.cuda_major}, got none. Install NVIDIA's CUDA "
            f"{plan.cuda_major} toolkit, or update the driver to CUDA 13 (580 or newer), whose "
            "nvcc comes from PyPI; M3I_CUDA=OFF installs without CUDA kernels."
        )
    if nvcc is not None:
        # A wrapper, not a link: nvcc looks for its files beside the path it was called by.
        wrapper = VENV / "bin" / "nvcc"
        wrapper.write_text(f'#!/bin/sh\nexec "{nvcc}" "$@"\n')
        wrapper.chmod(0o755)


def install_package(plan: Plan, *arguments: str) -> None:
    """Compile the C++ against the venv's torch and install the package in editable mode."""
    os.environ["PATH"] = f"{VENV / 'bin'}:{os.environ['PATH']}"
    cuda = "ON" if plan.build_cuda else "OFF"
    setting = f"--config-settings=cmake.define.M3I_CUDA={cuda}"
    pip_install("--no-build-isolation", setting, *arguments, compiles=True)


def make_environment(where: Path) -> None:
    """Make a virtual environment at a path, or keep the one that is there.

    Runs the Python that this one's environment was made from: with .venv activated, or on PATH as
    in make, this one is in the .venv that may just have been removed.
    """
    run(sys._base_executable, "-m", "venv", where)  # type: ignore[attr-defined]


def install_everything(plan: Plan) -> None:
    """Install all packages into an empty or outdated .venv."""
    print(f"{plan.reason}: {plan.torch}, extras {','.join(plan.extras)}", flush=True)
    make_environment(VENV)
    # Resolved together with the packages that fix torch's version, which decides nvcc's. DALI is
    # there before the package is built, for which operators for it are compiled.
    wanted = requirements(plan.extras)
    dali = [row for row in wanted if row.startswith("nvidia-dali-")]
    pip_install(*BUILD_WITH, plan.torch, *WANT_ONE_TORCH, *dali)
    torch, _ = installed_torch()
    expect_torch_of(plan.cuda_major, torch)
    install_nvcc(plan)
    # pip unpacks the other packages while the C++ is compiled.
    with ThreadPoolExecutor(1) as beside:
        others = beside.submit(pip_install, f"torch=={torch}", *wanted)
        install_package(plan, "--no-deps", "--editable", ".")
        others.result()


def digest(paths: Iterable[Path], *more: object) -> str:
    """Hash names and contents of files, and further values, to detect changes."""
    state = hashlib.sha256(json.dumps([str(item) for item in more]).encode())
    for path in sorted(paths):
        state.update(f"\0{path.relative_to(ROOT)}\0".encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def wanted_state(plan: Plan) -> dict[str, str]:
    """Return what .venv has to be made from, by what is redone after a change of it.

    A changed root, python or torch needs a new .venv, changed packages a run of pip, and cpp or
    modules alone a rebuild, since an editable install maps the package's files by name.
    """
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__).resolve()]
    return {
        "root": str(ROOT),
        "python": sys.version,
        "torch": plan.torch,
        "packages": digest(files, plan.extras, plan.build_cuda),
        "cpp": digest(package_sources()),
        "modules": digest((), *package_files()),
    }


def package_sources() -> list[Path]:
    """List what the package is compiled from: not the emulator's or the null runtime's sources."""
    cuda = ROOT / "cuda"
    apart = {cuda / "emulator", cuda / "null"}
    files = filter(Path.is_file, cuda.rglob("*"))
    return [ROOT / "CMakeLists.txt", *(path for path in files if not apart & {*path.parents})]


def package_files() -> list[str]:
    """List the package's files, which an editable install maps one by one."""
    folders = (ROOT / name for name in ("m3i_fast", "pipelines", "benchmarks"))
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in paths
        if path.parent.name not in ("__pycache__", "results")
    )


def bring_up_to_date(plan: Plan) -> None:
    """Install what is missing and rebuild what changed in .venv."""
    wanted = wanted_state(plan)
    done = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    stale = {part for part in wanted if done.get(part) != wanted[part]}
    if done and stale & {"root", "python", "torch"}:
        shutil.rmtree(VENV)
    if stale - {"cpp", "modules"}:
        STAMP.unlink(missing_ok=True)
        install_everything(plan)
    elif stale:
        STAMP.write_text(json.dumps({**wanted, "cpp": "being built"}))
        install_package(plan, "--no-deps", "--editable", ".")
    STAMP.write_text(json.dumps(wanted))


def main() -> None:
    """Bring .venv up to date for this machine; exits with a message where that is impossible."""
    if sys.version_info < (3, 10):  # noqa: UP036 - make may have found an older one
        sys.exit(f"Python: expected 3.10 or newer, got {sys.version.split()[0]}")
    if not shutil.which(os.environ.get("CXX", "g++")):
        sys.exit("g++: not found; install a C++17 compiler (Debian: apt-get install g++)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        sys.exit("Python.h: not found; install its headers (Debian: apt-get install python3-dev)")
    driver = runpy.run_path(str(ROOT / "m3i_fast" / "doctor" / "probes.py"))["driver"]()
    try:
        plan = plan_for(tuple(driver["cuda"]) if "cuda" in driver else None)
        bring_up_to_date(overruled(plan, os.environ.get("M3I_CUDA", "")))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
