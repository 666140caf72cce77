"""Run the CUDA side of the project on the real CUDA torch without a GPU, and test what it asks for.

    make first-contact [ARGS="pytest's arguments"]

Builds build/cuda and the null CUDA runtime (cuda/null/README.md) into build/null.
"""

from __future__ import annotations

import sys

from scripts import cuda_environment, install, null_cuda

LIBRARIES = cuda_environment.ROOT / "build" / "null"


def main() -> None:
    """Bring both up to date and run the contract tests."""
    cuda_environment.bring_up_to_date()
    null_cuda.build(cuda_environment.site_packages(), LIBRARIES)
    tests = ["-o", "python_files=contract_*.py", "tests/null_cuda", *sys.argv[1:]]
    install.run(cuda_environment.PYTHON, "-m", "pytest", *tests)


if __name__ == "__main__":
    main()
