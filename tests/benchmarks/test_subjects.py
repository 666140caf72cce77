"""Every benchmark tells its flags, and names the nearest one of a mistyped flag."""

from __future__ import annotations

import re

import pytest

from m3i_fast.benchmarks.subjects import SUBJECTS, load

# What stands before the flags.
FIRST = {"compare": ["dcnv3"], "node": ["demo"], "scaling": ["demo"]}


@pytest.mark.parametrize("name", SUBJECTS)
def test_help_tells_the_flags_and_a_slip_is_answered_by_the_nearest(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, first = load(name), FIRST.get(name, [])
    with pytest.raises(SystemExit) as ended:
        main([*first, "--help"])
    assert not ended.value.code
    told = capsys.readouterr().out
    assert told.startswith(f"usage: m3i-fast bench {name}")
    assert len(told.splitlines()) < 90  # of a benchmark's own flags, without those of a recipe
    flags = {flag for flag in re.findall(r"--[a-z][a-z-]+[a-z]", told) if flag[:5] != "--no-"}
    flag = max(sorted(flags - {"--help", "--help-all"}), key=len)
    slip = f"{flag[:-1]}x"
    with pytest.raises(ValueError, match=rf"unknown flag {slip}\. Did you mean {flag}\?"):
        main([*first, slip, "1"])


def test_a_comparison_asks_for_its_subject(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("compare")(["--help"])
    assert capsys.readouterr().out.startswith("usage: m3i-fast bench compare SUBJECT")
    with pytest.raises(ValueError, match="expected a subject, one of .*dcnv3.*, got --pairs; type"):
        load("compare")(["--pairs", "3"])


def test_numbers_of_processes_are_refused_by_their_flag() -> None:
    with pytest.raises(ValueError, match="--windows: expected a whole number, got 'many'"):
        load("loader")(["--windows", "many"])
