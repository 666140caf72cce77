"""Make the golden files: what the code gives today, that later changes are compared with.

    python -m tests.golden.make                  all parts
    python -m tests.golden.make recipes losses   only these
    python -m tests.golden.make run              train the stored run and pack its data again

A part is a function of `PARTS` that returns a value for JSON. Parts are computed in a process with
the settings of ENVIRONMENT, because torch reads these when it is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.golden.differences import Golden, machine, path_of, write
from tests.golden.exports import exports
from tests.golden.ledger_tables import tables
from tests.golden.settings import commands_of_docs, flags, recipes, wrong_values
from tests.golden.training import losses, make_stored_run, resume
from tests.golden.views import samples

PARTS = {
    "recipes": recipes,
    "flags": flags,
    "wrong_values": wrong_values,
    "losses": losses,
    "samples": samples,
    "resume": resume,
    "exports": exports,
    "tables": tables,
    "commands_of_docs": commands_of_docs,
}
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    # The same vector width on every x86-64 CPU with AVX2, and one order of all sums.
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    # What texts of commands depend on.
    "COLUMNS": "100",
    "NO_COLOR": "1",
    "TERM": "dumb",
}


def computed(names: Iterable[str]) -> dict[str, Golden]:
    """Return what these parts give now, from a new process with the settings of ENVIRONMENT."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "computed.json"
        command = [sys.executable, "-m", "tests.golden.make", *names, "--compute", str(out)]
        # Neither the user's runs nor data are in reach of a part.
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"parts {' '.join(names)}: {done.stderr}")
        found: dict[str, Any] = json.loads(out.read_text())
        return {name: Golden(**each) for name, each in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.make")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join([*PARTS, "run"]))
    parser.add_argument("--compute", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if unknown := set(given.parts) - {*PARTS, "run"}:
        parser.error(f"PART: expected some of {', '.join([*PARTS, 'run'])}, got {sorted(unknown)}")
    names = [name for name in given.parts or PARTS if name != "run"]
    if given.compute:
        if "run" in given.parts:
            make_stored_run()
        values = {name: {"machine": machine(), "value": PARTS[name]()} for name in names}
        given.compute.write_text(json.dumps(values))
        return
    if "run" in given.parts:
        computed(["run"])
        names += [name for name in ("losses", "resume", "exports") if name not in names]
    for name, golden in computed(names).items():
        is_changed = write(name, golden)
        sys.stdout.write(f"{'changed' if is_changed else 'as before'}: {path_of(name)}\n")


if __name__ == "__main__":
    main()
