"""Run the CUDA side of the project on the real CUDA torch without a GPU, and test what it asks for.

    make first-contact [ARGS="pytest's arguments"]

Builds build/cuda and the null CUDA runtime (cuda/null/README.md) into build/null. Tests that are
marked nightly run with ARGS="-m nightly" alone.
"""

from __future__ import annotations

import sys

from scripts import cuda_environment, install, null_cuda

LIBRARIES = cuda_environment.ROOT / "build" / "null"


def main() -> None:
    """Bring both up to date and run the contract tests."""
    cuda_environment.bring_up_to_date()
    null_cuda.build(cuda_environment.site_packages(), LIBRARIES)
    install.run(cuda_environment.PYTHON, "-m", "pytest", *pytest_arguments(sys.argv[1:]))


def pytest_arguments(asked: list[str]) -> list[str]:
    """Return pytest's arguments: all contract tests but the nightly ones, unless -m is asked."""
    marked = any(argument.startswith("-m") for argument in asked)
    chosen = [] if marked else ["-m", "not nightly"]
    workers = ["--group=first-contact", "-n", "2", "--dist", "loadfile"]
    return [*workers, "-o", "python_files=contract_*.py", *chosen, "tests/null_cuda", *asked]


if __name__ == "__main__":
    main()
