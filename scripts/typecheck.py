"""Run mypy on the package as it is installed: pipelines/ and benchmarks/ inside m3i_fast/.

mypy cannot read the mapping in pyproject.toml, so the package is laid out as links in build/types,
and the two folders' paths are reported as they stand in the repository.
"""

import os
import re
import sys

from mypy import api

from scripts import checks

ROOT = checks.ROOT
TREE = ROOT / "build" / "types"
MAPPED = ("pipelines", "benchmarks")


def lay_out() -> None:
    """Link each entry of m3i_fast/ and the two mapped folders into build/types/m3i_fast."""
    package = TREE / "m3i_fast"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    targets = [*(ROOT / "m3i_fast").iterdir(), *(ROOT / folder for folder in MAPPED)]
    for target in targets:
        if target.name != "__pycache__":
            (package / target.name).symlink_to(target)


def main() -> int:
    """Run mypy and return its exit status."""
    lay_out()
    os.chdir(TREE)  # mypy looks for the package in the working directory first
    options = [f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={checks.CACHE / 'mypy'}"]
    output, errors, status = api.run([*options, *sys.argv[1:]])
    sys.stdout.write(re.sub(r"^m3i_fast/(pipelines|benchmarks)\b", r"\1", output, flags=re.M))
    sys.stderr.write(errors)
    return status


if __name__ == "__main__":
    sys.exit(main())
