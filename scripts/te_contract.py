"""Build Transformer Engine without a GPU, and test that we call it as this release wants.

    make te-contract [ARGS="pytest's arguments"]

The release is that of pyproject.toml's extra `te`; its part for torch is compiled into build/cuda,
with nvcc of PyPI: once, 33 files, ten minutes on two idle cores. MAX_JOBS bounds compilers.
"""

from __future__ import annotations

import re
import sys

from scripts import cuda_environment, install, null_cuda


def release() -> str:
    """Return the exact release of pyproject.toml's extra, as 2.20.2."""
    text = (cuda_environment.ROOT / "pyproject.toml").read_text()
    pinned = re.search(r'"transformer-engine\[[^]]*\]==([0-9.]+)"', text)
    if pinned is None:
        sys.exit("pyproject.toml: expected an exact release of transformer-engine in the extra te")
    return pinned[1]


def build_te() -> None:
    """Compile Transformer Engine into build/cuda."""
    te = release()
    cuda_environment.pip(
        "--no-build-isolation", f"transformer-engine=={te}",
        f"transformer-engine-cu13=={te}", f"transformer-engine-torch=={te}",
    )  # fmt: skip


def main() -> None:
    """Bring build/cuda up to date, with Transformer Engine, and run the contract tests in it."""
    cuda_environment.bring_up_to_date()
    if cuda_environment.done_state().get("te") != release():
        build_te()
        cuda_environment.remember(te=release())
    null_cuda.build(cuda_environment.site_packages(), cuda_environment.ROOT / "build" / "null")
    tests = ["-o", "python_files=contract_*.py", "tests/te", *sys.argv[1:]]
    install.run(cuda_environment.PYTHON, "-m", "pytest", *tests)


if __name__ == "__main__":
    main()
