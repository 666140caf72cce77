"""The build of `make gpu` in build/gpu: the package's layout, its modules built by plain CMake."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.gpu.steps import ROOT, Runner, Step

BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
LIMIT_S = 900.0

# An editable install of this package in the same python takes precedence over any path.
SITECUSTOMIZE = """import sys

own = [f for f in sys.meta_path if "m3i_fast" in getattr(f, "known_source_files", ())]
sys.meta_path[:] = [f for f in sys.meta_path if f not in own]
"""

DESCRIBE = """import json, sys
from dataclasses import asdict
from m3i_fast.observe.environment import environment
from m3i_fast.ops import library

names = ("m3i_fast._C", "m3i_fast._C_cuda")
modules = {name: sys.modules[name].__file__ for name in names if name in sys.modules}
print(json.dumps({**asdict(environment()), "command": "make gpu", "modules": modules}))
"""


FIND = """import json, pathlib
from importlib.util import find_spec

package, kernels = find_spec("m3i_fast"), find_spec("m3i_fast._C_cuda")
site = pathlib.Path(package.origin).parent.parent
print(json.dumps([str(site), kernels.origin if kernels else None]))
"""


def build(run: Runner, nvcc: Path | None) -> bool:
    """Configure, build and install into build/gpu; returns whether all steps passed."""
    generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
    configure = ["cmake", "--fresh", "-S", ROOT, "-B", BUILD, "-G", generator]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DM3I_CUDA={'ON' if nvcc else 'OFF'}"]
    if nvcc:
        configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
    lay_out()
    for name, command in {
        "configure": configure,
        "build": ["cmake", "--build", BUILD, "--parallel", str(os.cpu_count())],
        "install": ["cmake", "--install", BUILD, "--prefix", SITE],
    }.items():
        step = Step(name=name, command=tuple(map(str, command)), limit_s=LIMIT_S)
        if run(step, always=True).has_failed:
            return False
    return True


def lay_out() -> None:
    """Link the sources into the folders that pyproject.toml maps them to."""
    package = SITE / "m3i_fast"
    shutil.rmtree(SITE, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (*(ROOT / "m3i_fast").iterdir(), ROOT / "pipelines", ROOT / "benchmarks"):
        if source.name != "__pycache__" and source.suffix != ".so":
            (package / source.name).symlink_to(source)
    (SITE / "sitecustomize.py").write_text(SITECUSTOMIZE)


def find_installed(python: str) -> tuple[Path, Path | None] | None:
    """Return the folder that an installed package is imported from, and its CUDA kernels.

    None where this python has no m3i_fast.
    """
    with tempfile.TemporaryDirectory() as elsewhere:  # the checkout's own folder has no kernels
        done = subprocess.run([python, "-c", FIND], cwd=elsewhere, capture_output=True, text=True)
    if done.returncode:
        return None
    site, kernels = json.loads(done.stdout.splitlines()[-1])
    return Path(site), Path(kernels) if kernels else None


def describe(
    out: Path, inventory: dict[str, str | None], wanted: set[str], site: Path, built: bool
) -> str:
    """Write env.json and nvidia-smi.txt; returns a digest of the compiled modules that are loaded.

    wanted: the modules that have to load. built: they have to be those of `site`. Raises ValueError
    if others are loaded.
    """
    if inventory["nvidia-smi"]:
        shown = subprocess.run([inventory["nvidia-smi"], "-q"], capture_output=True, text=True)
        (out / "nvidia-smi.txt").write_text(shown.stdout + shown.stderr)
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE],
        cwd=site if built else out,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"m3i_fast: expected the build in {site} to load, got an error\n{done.stderr}"
        )
    facts = json.loads(done.stdout.splitlines()[-1])
    found = facts["modules"].items()
    ours = {name for name, file in found if not built or Path(file).is_relative_to(site)}
    if ours != wanted:
        raise ValueError(f"m3i_fast: expected {sorted(wanted)} of {site}, got {facts['modules']}")
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for _, file in sorted(found)))
    facts |= {"modules": sorted(ours), "build": digest.hexdigest(), "inventory": inventory}
    (out / "env.json").write_text(json.dumps(facts, indent=2) + "\n")
    return digest.hexdigest()
