"""Build Transformer Engine without a GPU, and test our calls against its release.

    make te-contract [ARGS="pytest's arguments"]

The release is that of pyproject.toml's extra `te`. Its extension for torch is compiled once, with
PyPI's nvcc, into build/te: 33 files, ten minutes on two idle cores, 7 GB. MAX_JOBS limits the
number of compilers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

from scripts import install

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "build" / "te"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"
TORCH = "torch==2.15.*"
PACKAGES = (
    *("setuptools", "wheel", "pybind11", "ninja", "packaging", "cmake", "scikit-build-core"),
    *("numpy", "safetensors", "rich", "tyro>=1.0", "cattrs", "tensorboard", "pytest"),
)
# Headers that Transformer Engine's sources need and torch's wheels lack.
TOOLKIT = ("nvidia-curand", "nvidia-cuda-nvrtc")


def release() -> str:
    """Read Transformer Engine's release, such as 2.20.2, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    pinned = re.search(r'"transformer-engine\[[^]]*\]==([0-9.]+)"', text)
    if pinned is None:
        sys.exit("pyproject.toml: expected an exact release of transformer-engine in the extra te")
    return pinned[1]


def wanted_state() -> dict[str, str]:
    """Return what build/te has to be made from, by what is redone after a change of it.

    `te` needs a new build, `cpp` alone only our package.
    """
    cpp_files = [ROOT / "CMakeLists.txt", *filter(Path.is_file, (ROOT / "cuda").rglob("*"))]
    requirements = [release(), TORCH, *PACKAGES, *TOOLKIT]
    return {
        "te": install.digest([], ROOT, sys.version, *requirements),
        "cpp": install.digest(cpp_files),
    }


def pip(*arguments: str) -> None:
    """Install by pip into the venv from PyPI, whose torch has CUDA, whatever pip's settings."""
    environment = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""}
    os.environ.update(environment)
    install.run(PYTHON, "-m", "pip", "install", "--quiet", *arguments)


def name_toolkit(site: Path) -> None:
    """Point the build at the toolkit in the venv: CUDA_HOME, and cuDNN and NCCL beside it."""
    toolkit = site / "nvidia" / "cu13"
    install.complete_toolkit(toolkit)
    headers = [str(site / "nvidia" / name / "include") for name in ("cudnn", "nccl")]
    os.environ["CUDA_HOME"] = str(toolkit)
    os.environ["CPATH"] = os.pathsep.join([*headers, *filter(None, [os.environ.get("CPATH")])])
    os.environ["PATH"] = os.pathsep.join([str(VENV / "bin"), os.environ["PATH"]])


def build_te() -> None:
    """Make a venv and build Transformer Engine in it."""
    shutil.rmtree(VENV, ignore_errors=True)
    install.make_environment(VENV)
    pip(TORCH, *PACKAGES)
    install.PYTHON = PYTHON
    _, cuda = install.installed_torch()
    if cuda is None or not cuda.startswith("13."):
        sys.exit(f"torch: expected a build with CUDA 13, got {cuda or 'none'} from pip")
    pip(install.nvcc_requirement(cuda), *TOOLKIT, TORCH)
    (site,) = VENV.glob("lib/python*/site-packages")
    name_toolkit(site)
    te = release()
    pip("--no-build-isolation", TORCH, f"transformer-engine=={te}",
        f"transformer-engine-cu13=={te}", f"transformer-engine-torch=={te}")  # fmt: skip


def build_package() -> None:
    """Build our package into the venv without its CUDA kernels, in a separate build folder."""
    os.environ["PATH"] = os.pathsep.join([str(VENV / "bin"), os.environ["PATH"]])
    settings = {"build-dir": VENV / "cmake", "cmake.define.M3I_CUDA": "OFF"}
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    pip("--no-build-isolation", "--no-deps", *options, "--editable", ".")


def main() -> None:
    """Bring build/te up to date and run the contract tests in it."""
    wanted = wanted_state()
    done = json.loads(STAMP.read_text()) if STAMP.is_file() else {}
    if done.get("te") != wanted["te"]:
        build_te()
        done = {"te": wanted["te"]}
        STAMP.write_text(json.dumps(done))
    if done.get("cpp") != wanted["cpp"]:
        build_package()
        STAMP.write_text(json.dumps(wanted))
    tests = ["-o", "python_files=contract_*.py", "tests/te", *sys.argv[1:]]
    install.run(PYTHON, "-m", "pytest", *tests)


if __name__ == "__main__":
    main()
