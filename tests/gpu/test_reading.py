"""What the steps of `make gpu` found out, read from outputs as the tools print them."""

from __future__ import annotations

import json
from pathlib import Path

from m3i_fast.op_registry import OPS
from scripts.gpu import reading

ROOT = Path(__file__).resolve().parents[2]

PTX = """
Fatbin ptx code:
================
arch = sm_80
code version = [{version}]
"""
USAGE = """
Fatbin elf code:
================
arch = {architecture}
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3m3i8mask_mix15mask_mix_kernelINS_8BFloat16ELi16EEEvNS_13MaskMixParamsE:
  REG:{registers} STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_registers_are_held_against_the_budget_of_the_card(tmp_path: Path) -> None:
    budget = json.loads((ROOT / "cuda" / "mask_mix" / "budget.json").read_text())
    allowed = budget["sm_90a"]["mask_mix_kernel<BFloat16, 16>"]["registers"]
    for registers, word in ((allowed, "all 1 within"), (allowed + 1, "over: {'mask_mix_kernel")):
        output = USAGE.format(architecture="sm_90a", registers=registers)
        output += USAGE.format(architecture="sm_80", registers=255)  # other code than the card's
        for ptx, kind in (("9,0", "must"), ("9,2", "note")):  # of CUDA 13.0 and 13.2
            found = reading.registers_of((9, 0), tmp_path, PTX.format(version=ptx) + output)
            assert [each.kind for each in found] == [kind]
        (check,) = found
        assert check.what == "registers of mask_mix for sm_90a"
        assert check.got.startswith(word)
        assert check.holds is False  # seven kernels of the budget are not there
    (none,) = reading.registers_of((9, 0), tmp_path, "")
    other = USAGE.format(architecture="sm_100", registers=1)
    (others,) = reading.registers_of((9, 0), tmp_path, other)
    assert none.holds is False and others.holds is False


def test_a_card_without_a_budget_is_no_fault(tmp_path: Path) -> None:
    output = USAGE.format(architecture="sm_100", registers=255)
    (check,) = reading.registers_of((10, 0), tmp_path, output)
    assert check.holds is None and check.got == "kernels for sm_100"


def test_tests_are_counted_and_the_first_failures_named(tmp_path: Path) -> None:
    cases = "".join(
        f'<testcase classname="tests.a" name="t{n}">{"<failure/>" if n < 7 else ""}</testcase>'
        for n in range(10)
    )
    suite = f'<testsuite tests="10" failures="7" errors="0" skipped="2">{cases}</testsuite>'
    (tmp_path / "tests.xml").write_text(f"<testsuites>{suite}</testsuites>")
    (check,) = reading.tests_of("tests.xml", tmp_path, "")
    assert check.holds is False and check.got.startswith("7 failed of 10, 2 skipped: tests.a::t0,")
    assert check.got.endswith("tests.a::t4 and others")
    (collected,) = reading.tests_of("tests.xml", tmp_path, "234/4460 tests collected (4226 des")
    assert collected.holds and collected.got == "234 collected, none run"
    (missing,) = reading.tests_of("other.xml", tmp_path, "")
    assert missing.holds is False


def test_findings_of_the_doctor_that_are_absent_are_no_fault(tmp_path: Path) -> None:
    findings = [
        {"subject": level, "level": level, "detail": "d", "fix": ""}
        for level in ("ok", "absent", "warning", "error")
    ]
    output = "a warning\n" + json.dumps({"can_train": False, "findings": findings}, indent=2)
    checks = reading.findings_of_doctor(tmp_path, output)
    assert [check.holds for check in checks] == [True, None, False, False]
    assert {check.kind for check in checks} == {"note"}


def test_a_benchmark_stands_beside_the_others(tmp_path: Path) -> None:
    timings = {"m3i_fast": {"median_ms": 8.0}, "ClipLoss": {"median_ms": 24.0}}
    sizes = {"rows": 32768, "columns": 32768, "dim": 512, "dtype": "bfloat16"}
    figures = {**sizes, "pass": "forward", "timings": timings}
    rows = [json.dumps({"run_id": run, "figures": figures}) for run in ("earlier", "last")]
    (tmp_path / "boltzmann.jsonl").write_text("\n".join(rows))
    (check,) = reading.figures_of("boltzmann", tmp_path, "")
    assert check.holds is None and check.got == "8 ms; ClipLoss 3.00 times as long"
    assert check.what.startswith("boltzmann: rows 32768, columns 32768, dim 512")


def test_what_is_expected_of_a_step_names_kernels_of_ours() -> None:
    """Those of Hopper on 9.0 alone; each is in the budget of an op."""
    known = {
        name
        for op in OPS
        for budget in json.loads((ROOT / op.budget).read_text()).values()
        for name in budget
    }
    expected = json.loads((ROOT / "scripts" / "gpu" / "expected.json").read_text())
    assert expected.keys() == {"8.0", "9.0", "10.0"}
    for capability, counts in expected.items():
        kernels = counts["kernels"]
        assert kernels.keys() <= known
        assert any("hopper" in name for name in kernels) == (capability == "9.0")
