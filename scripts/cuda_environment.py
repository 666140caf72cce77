"""Make build/cuda: the CUDA build of torch, without a GPU, and this package with its CUDA kernels.

`make te-contract` adds Transformer Engine to it; `make first-contact` runs it on the null CUDA
runtime. Both bring it up to date first: 2 minutes, 5 GB, and the time to compile the kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import tomllib

from scripts import install

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build" / "cuda"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"
CONSTRAINTS = ROOT / "constraints-cuda.txt"
# Besides what the package itself depends on.
PACKAGES = (
    *("setuptools", "wheel", "pybind11", "ninja", "packaging", "cmake", "scikit-build-core"),
    *("torchao", "pytest", "pytest-xdist"),
    *("cuda-toolkit[nvcc,nvrtc,cudart,cccl]", "nvidia-curand", "nvidia-ml-py"),
)
# The cards that the null runtime is asked to be: code for 8.0 and for 9.0's own instructions.
ARCHITECTURES = "80;90a-real"


def packages() -> tuple[str, ...]:
    """Return what build/cuda holds besides our package: its own dependencies, and PACKAGES."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return (*project["dependencies"], *PACKAGES)


def wanted_state() -> dict[str, str]:
    """Say what build/cuda is made from: another `torch` makes it anew, `cpp` our package alone."""
    constraints = CONSTRAINTS.read_text()
    return {
        "torch": install.digest([], ROOT, sys.version, *packages(), constraints),
        "cpp": install.digest(install.package_sources(), ARCHITECTURES),
        "modules": install.digest((), *install.package_files()),
    }


def done_state() -> dict[str, str]:
    """Return the state that build/cuda is in; empty where it is not there, or half made."""
    return json.loads(STAMP.read_text()) if STAMP.is_file() else {}


def remember(**parts: str) -> None:
    """Write down that these parts are as wanted."""
    STAMP.write_text(json.dumps({**done_state(), **parts}))


def site_packages() -> Path:
    """Return the folder of the environment's packages."""
    (site,) = VENV.glob("lib/python*/site-packages")
    return site


def pip(*arguments: str) -> None:
    """Run pip in the environment: torch with CUDA, whatever pip's own settings prefer here."""
    os.environ.update({"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""})
    options = ("--quiet", "--disable-pip-version-check", "--constraint", str(CONSTRAINTS))
    install.run(PYTHON, "-m", "pip", "install", *options, *arguments)


def name_toolkit() -> None:
    """Point compilers at the environment's toolkit: CUDA_HOME, and cuDNN and NCCL beside it."""
    nvidia = site_packages() / "nvidia"
    toolkit = nvidia / "cu13"
    install.complete_toolkit(toolkit)
    headers = [str(nvidia / name / "include") for name in ("cudnn", "nccl")]
    os.environ["CUDA_HOME"] = str(toolkit)
    os.environ["CUDACXX"] = str(toolkit / "bin" / "nvcc")
    os.environ["CPATH"] = os.pathsep.join([*headers, *filter(None, [os.environ.get("CPATH")])])
    os.environ["PATH"] = os.pathsep.join([str(VENV / "bin"), os.environ["PATH"]])


def build_torch() -> None:
    """Make the environment from nothing, without our package."""
    shutil.rmtree(VENV, ignore_errors=True)
    install.make_environment(VENV)
    pip(*packages())


def build_package() -> None:
    """Compile our package and its kernels, against a runtime that another can take the place of."""
    settings = {
        "build-dir": VENV / "cmake",
        "cmake.define.M3I_CUDA": "ON",
        "cmake.define.M3I_SHARED_CUDART": "ON",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES": ARCHITECTURES,
    }
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    pip("--no-build-isolation", "--no-deps", *options, "--editable", ".")


def bring_up_to_date() -> None:
    """Install or compile what is not as wanted, and name the toolkit to what follows."""
    wanted, done = wanted_state(), done_state()
    if done.get("torch") != wanted["torch"]:
        build_torch()
        remember(torch=wanted["torch"])
        done = done_state()
    name_toolkit()
    if any(done.get(part) != wanted[part] for part in ("cpp", "modules")):
        build_package()
        remember(cpp=wanted["cpp"], modules=wanted["modules"])
