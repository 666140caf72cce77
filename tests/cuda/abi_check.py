"""Check, by hand, that a `_C_cuda` built against one torch is loaded by a CUDA torch of another.

    .venv/bin/python tests/cuda/abi_check.py [--cuda-python PYTHON]

Builds both modules with nvcc against the torch of the Python that runs this (a CPU torch will do),
then imports them in PYTHON, whose torch must have CUDA, and looks every op up in its dispatcher. No
GPU is needed: nothing is launched where none is seen, and where one is, the kernel's
bits are compared with the CPU's. Without --cuda-python a virtual environment is made below
build/abi_check and the newest torch installed into it (5 GB).
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
logger = logging.getLogger(__name__)

# Runs in the other torch, beside the built modules.
_PROBE = """
import sys
import torch
assert torch.version.cuda, f"torch {torch.__version__} of {sys.executable} has no CUDA"
import _C, _C_cuda
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = "m3i::mask_mix", "m3i::dcnv3", "m3i::dcnv3_bwd", "m3i::gaussian", "m3i::gaussian_bwd"
for op in ops:
    for key in ("CPU", "CUDA"):
        assert has(op, key), f"{op} has no kernel for {key}"
views = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
choice = torch.randint(2, (2, 2, 2), dtype=torch.uint8)
members = torch.tensor([[0, 1], [2, 3]])
rest = [0.5] * 3, [0.25] * 3, torch.float32
mixed = torch.ops.m3i.mask_mix(views, choice, members, *rest)
launched = "no GPU, not launched"
if torch.cuda.is_available():
    on_cuda = torch.ops.m3i.mask_mix(views.cuda(), choice.cuda(), members.cuda(), *rest)
    assert torch.equal(on_cuda.cpu(), mixed), "CUDA and CPU differ"
    launched = "CUDA equals CPU, bit for bit"
print(f"torch {torch.__version__} (CUDA {torch.version.cuda}), Python {sys.version.split()[0]}: "
      f"loaded {_C_cuda.__file__}; {', '.join(ops)} registered for CPU and CUDA; "
      f"mask_mix: the CPU kernel ran; {launched}")
"""


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path) -> None:
    """Both modules into `folder`, against the torch of this Python."""
    cmake = Path(sysconfig.get_path("scripts")) / "cmake"
    program = cmake if cmake.is_file() else Path("cmake")
    run(
        program,
        "-S",
        ROOT,
        "-B",
        folder,
        "-DCMAKE_BUILD_TYPE=Release",
        "-DM3I_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    run(program, "--build", folder, "--parallel", "2")


def make_cuda_python(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        run(python, "-m", "pip", "install", "--quiet", "torch", "numpy")
    return python


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda-python", type=Path, help="a Python whose torch has CUDA")
    arguments = parser.parse_args()
    python = arguments.cuda_python or make_cuda_python(ROOT / "build" / "abi_check")
    with tempfile.TemporaryDirectory() as folder:
        version = run(sys.executable, "-c", "import torch; print(torch.__version__)").strip()
        logger.info("building against torch %s of %s", version, sys.executable)
        build(Path(folder))
        logger.info(run(python.absolute(), "-c", _PROBE, cwd=Path(folder)).strip())


if __name__ == "__main__":
    main()
