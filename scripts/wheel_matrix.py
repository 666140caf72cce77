"""Build the wheel once and try it alone in fresh environments of several Pythons and torches.

    make wheels                     two Pythons, two torches: part of .ci/run
    make wheels ARGS=--all          with CUDA kernels, Python 3.10 to 3.13, torch 2.10 to 2.15

The wheel stays in build/wheels/dist, tagged with the oldest Linux that it runs on, which auditwheel
reads from its symbols. Each environment is removed again: those of CUDA builds of torch have 5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import cuda_environment, install

ROOT = install.ROOT
FOLDER = ROOT / "build" / "wheels"
SMOKE = ROOT / "scripts" / "wheel_smoke.py"
# The floor of torch's own wheels: glibc 2.28, and the libstdc++ of GCC 8.
FLOOR = (2, 28)
PLATFORM = f"manylinux_{FLOOR[0]}_{FLOOR[1]}_{platform.machine()}"
EXTRAS = "shards,eval"
PAGE = ROOT / "docs" / "start" / "adapt.md"
PAGE_EXTRAS = "timm,hf,onnx"


@dataclass(frozen=True)
class Case:
    """One environment."""

    python: str
    torch: str
    """Its minor version."""
    cuda: bool = True
    """The CUDA build, which is the only one that PyPI serves for Linux on x86-64."""
    nightly: bool = True
    adapts: bool = False
    """Whether the newcomer's page is gone through too, with the libraries that it exports to."""

    @property
    def name(self) -> str:
        return f"python{self.python}-torch{self.torch}"


CASES = (
    # What `make install` takes without a GPU.
    Case("3.11", "2.13", cuda=False, nightly=False, adapts=True),
    # The torch of build/cuda, whose CUDA libraries it shares.
    Case("3.13", "2.15", nightly=False),
    Case("3.10", "2.10"),
    Case("3.12", "2.11"),
    Case("3.13", "2.12"),
)


# ---- The wheel -----------------------------------------------------------------------------------


def build_wheel(*, cuda: bool) -> Path:
    """Build the wheel from this tree in build/wheels, and tag it with the Linux that it needs.

    cuda: with CUDA kernels, by the nvcc of .venv. RuntimeError where its symbols need a newer one.
    """
    dist = FOLDER / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    # On a CPU's machine with the objects of `make install`, whose settings are the same.
    settings = {"cmake.define.M3I_CUDA": "ON" if cuda else "OFF"}
    if cuda:
        settings["build-dir"] = str(FOLDER / "cmake-cuda")
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    command = [install.PYTHON, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    os.environ["PATH"] = f"{install.VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"
    install.run(*command, "--no-build-isolation", "--no-deps", *options, "--wheel-dir", dist, ".")
    (wheel,) = dist.glob("*.whl")
    expect_floor(wheel)
    install.run(
        *(install.PYTHON, "-m", "wheel", "tags", "--remove", "--platform-tag", PLATFORM, wheel)
    )
    (wheel,) = dist.glob("*.whl")
    return wheel


def symbols_asked(wheel: Path) -> dict[str, Any]:
    """Return what auditwheel reads from a wheel: `sym_tag`, and `versioned_symbols` a library."""
    command = [install.PYTHON, "-m", "auditwheel", "show", "--json", wheel]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(shown.stdout)
    return facts


def expect_floor(wheel: Path) -> None:
    """Raise RuntimeError where the modules of a wheel ask for a Linux newer than PLATFORM."""
    facts = symbols_asked(wheel)
    if not is_old_enough(facts["sym_tag"]):
        raise RuntimeError(
            f"{wheel.name}: expected symbols of {PLATFORM}, got {facts['sym_tag']}: "
            f"{facts['versioned_symbols']}; m3i_lower_floor in CMakeLists.txt binds older ones"
        )


def is_old_enough(tag: str) -> bool:
    """Return whether a platform tag, as manylinux_2_17_x86_64, is PLATFORM or an older one.

    linux_x86_64, auditwheel's tag for symbols that no manylinux has, is newer than all.
    """
    found = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", tag)
    return found is not None and (int(found[1]), int(found[2])) <= FLOOR


# ---- Environments --------------------------------------------------------------------------------


def find_python(version: str) -> str:
    """Find a Python on the PATH or among pyenv's; RuntimeError with what to install without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [
        shutil.which(f"python{version}"),
        *map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)),
    ]
    code = "import ensurepip, sys; print('.'.join(map(str, sys.version_info[:2])))"
    for python in filter(None, candidates):
        # pyenv's shims are there for versions that are not switched on
        told = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if told.stdout.strip() == version:
            return python
    raise RuntimeError(
        f"python{version}: expected on the PATH or below {pyenv}, with venv, got none; "
        f"pyenv install {version}, or Debian's python{version}-venv"
    )


def make_environment(case: Case, where: Path) -> Path:
    """Make an environment with the case's torch and nothing of ours; returns its python."""
    install.run(find_python(case.python), "-m", "venv", where)
    python = where / "bin" / "python"
    if case.torch == torch_of_build_cuda():
        share_cuda_libraries(where)
        pip(python, "--constraint", str(cuda_environment.CONSTRAINTS), "torch", cuda=True)
    else:
        pip(python, f"torch=={case.torch}.*", cuda=case.cuda)
    return python


def pip(python: Path, *arguments: str, cuda: bool) -> None:
    """Run `pip install`; for CUDA's torch without the machine's own folders of CPU builds."""
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    plain = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""}
    command = [str(python), "-m", "pip", "install", *options, *arguments]
    print("+ pip install", *arguments, flush=True)
    subprocess.run(command, check=True, env={**os.environ, **(plain if cuda else {})})


def torch_of_build_cuda() -> str:
    """Return the minor version of torch in build/cuda, such as 2.15."""
    lines = cuda_environment.CONSTRAINTS.read_text().splitlines()
    (release,) = [line.partition("==")[2] for line in lines if line.startswith("torch==")]
    return release.rpartition(".")[0]


def share_cuda_libraries(where: Path) -> None:
    """Link NVIDIA's libraries of build/cuda into an environment, in the place of 3 GB more.

    They are the same for every Python. Hard links: what pip removes there stays in build/cuda.
    """
    if not cuda_environment.done_state().get("torch"):
        cuda_environment.build_torch()
        cuda_environment.remember(torch=cuda_environment.wanted_state()["torch"])
    source = cuda_environment.site_packages()
    (site,) = where.glob("lib/python*/site-packages")
    for path in [source / "nvidia", *source.glob("nvidia_*"), *source.glob("cuda_toolkit-*")]:
        if path.is_dir():
            shutil.copytree(path, site / path.name, copy_function=os.link, symlinks=True)


# ---- Trying it -----------------------------------------------------------------------------------


def smoke(python: Path, part: str, folder: Path, version: str, *more: str) -> dict[str, Any]:
    """Run one part of wheel_smoke.py in an empty folder; returns what it found."""
    home = folder.with_name("home")
    home.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environment = {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder.mkdir()
    command = [str(python), "-I", str(SMOKE), part, version, *more]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def try_case(case: Case, wheel: Path, *, cuda: bool) -> dict[str, Any]:
    """Install the wheel alone and try it, then its extras, and try the demo."""
    start = time.monotonic()
    version = wheel.name.split("-")[1]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=f"{case.name}-") as scratch:
        python = make_environment(case, Path(scratch) / "venv")
        held = [f"torch=={version_in(python, 'torch')}"]
        if case.torch == torch_of_build_cuda():
            held = ["--constraint", str(cuda_environment.CONSTRAINTS)]
        pip(python, *held, str(wheel), cuda=case.cuda)
        core = smoke(python, "core", Path(scratch) / "core", version)
        pip(python, *held, f"{wheel}[{EXTRAS}]", cuda=case.cuda)
        data = smoke(python, "data", Path(scratch) / "data", version)
        size = installed_mb(python)
        if case.adapts:
            pip(python, *held, f"{wheel}[{PAGE_EXTRAS}]", "onnxruntime", cuda=case.cuda)
            smoke(python, "adapt", Path(scratch) / "adapt", version, str(PAGE))
    expected = ["cpu", "cuda"] if cuda and case.cuda else ["cpu"]
    if core["kernels"] != expected:
        raise RuntimeError(f"{case.name}: expected kernels of {expected}, got {core['kernels']}")
    inside = set(zipfile.ZipFile(wheel).namelist())
    opened = {*core["data_files"], *data["data_files"]}
    if lost := opened - inside:
        raise RuntimeError(f"{case.name}: opened, and not in the wheel: {sorted(lost)}")
    return {
        **{name: core[name] for name in ("python", "torch", "kernels", "import_s")},
        "data_files": len(opened),
        "installed_mb": size,
        "seconds": round(time.monotonic() - start),
    }


def version_in(python: Path, package: str) -> str:
    """Return the version of a package that is installed in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}), end='')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout


def installed_mb(python: Path) -> float:
    """Return the size of what the wheel alone installs, in 10^6 bytes."""
    code = (
        "from importlib.metadata import files; "
        "print(sum(f.locate().stat().st_size for f in files('m3i-fast') if f.locate().exists()))"
    )
    told = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return round(int(told.stdout) / 1e6, 1)


def main() -> None:
    """Build the wheel and try all cases that are asked for; ends with 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="all cases, with CUDA kernels")
    parser.add_argument("--only", metavar="NAME", help="one case, such as python3.10-torch2.10")
    asked = parser.parse_args()
    cases = [case for case in CASES if asked.all or not case.nightly]
    if asked.only:
        cases = [case for case in CASES if case.name == asked.only]
    if not cases:
        sys.exit(f"--only: expected one of {', '.join(case.name for case in CASES)}")
    try:
        wheel = build_wheel(cuda=asked.all)
        print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        for case in cases:
            print(json.dumps(try_case(case, wheel, cuda=asked.all)), flush=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
