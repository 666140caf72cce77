"""The planted faults are complete, and still apply to the checkout."""

from __future__ import annotations

import re
import subprocess

from scripts import checks
from tests.planted.run import HERE, header, touched

PATCHES = sorted(HERE.glob("*.patch"))
PRODUCT = ("m3i_fast/", "pipelines/", "benchmarks/", "cuda/")


def test_there_are_thirty_and_the_gate_finds_most() -> None:
    gate = [p for p in PATCHES if any(test.endswith("(gate)") for test in header(p)[1])]
    assert len(PATCHES) >= 30
    assert len(gate) >= 24


def test_each_applies() -> None:
    for patch in PATCHES:
        command = ["git", "apply", "--check", str(patch)]
        ended = subprocess.run(command, cwd=checks.ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, (
            f"{patch.name}: {ended.stderr}plant it again in the code as it is"
        )


def test_each_is_a_small_fault_of_the_product() -> None:
    for patch in PATCHES:
        lines = patch.read_text().partition("\n--- ")[2].splitlines()
        added, removed = (sum(line.startswith(sign) for line in lines[2:]) for sign in "+-")
        assert 1 <= max(added, removed) <= 5, patch.name
        for file in touched(patch):
            assert file.startswith(PRODUCT), patch.name
            # The runner builds no extension; kernels of the emulator are compiled by the tests.
            assert not file.endswith(".cpp"), patch.name


def test_each_names_tests_that_exist() -> None:
    for patch in PATCHES:
        fault, found_by = header(patch)
        assert fault and found_by, patch.name
        for line in found_by:
            file, name, group = re.split(r"::| \(", line.rstrip(")"))
            assert group in (checks.GATE, *checks.GROUPS), f"{patch.name}: {line}"
            assert f"def {name}(" in (checks.ROOT / file).read_text(), f"{patch.name}: {line}"
