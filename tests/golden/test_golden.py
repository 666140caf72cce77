"""The code gives what the golden files say. CONTRIBUTING.md says when to make them again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest

from tests.golden.differences import STORED, Golden, assert_golden, differences, path_of, read
from tests.golden.make import PARTS, computed


@pytest.fixture(scope="module")
def now() -> dict[str, Golden]:
    return computed(PARTS)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_gives_what_its_golden_file_says(name: str, now: dict[str, Golden]) -> None:
    assert_golden(name, now[name])


def test_every_golden_file_is_of_a_part_and_all_are_small() -> None:
    files = [path for path in STORED.rglob("*") if path.is_file()]
    assert {path for path in files if path.parent == STORED} == {path_of(name) for name in PARTS}
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert sum(path.stat().st_size for path in files if STORED / "run" in path.parents) < 500 * 1024


def _scaled(golden: Golden, factor: float) -> Golden:
    """Return losses of which the second one of the first method is scaled."""
    value = copy.deepcopy(golden.value)
    row = value["m3i"][1]
    row["loss/total"] = (float.fromhex(row["loss/total"]) * factor).hex()
    return replace(golden, value=value)


def test_on_another_machine_floats_are_close_and_here_they_are_equal() -> None:
    golden = read("losses")
    elsewhere = replace(golden, machine=golden.machine | {"cpu": "another"})
    assert_golden("losses", golden)
    assert_golden("losses", _scaled(elsewhere, 1 + 1e-6))
    with pytest.raises(AssertionError, match=r"m3i / 1 / loss/total: expected .* got "):
        assert_golden("losses", _scaled(golden, 1 + 1e-6))
    with pytest.raises(AssertionError, match=r"make losses"):
        assert_golden("losses", _scaled(elsewhere, 1 + 1e-3))


@pytest.mark.parametrize(
    ("expected", "got", "exact", "said"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, False, ["a / b: expected 1, got 2"]),
        ({"a": 1}, {"b": 1}, True, ["a: expected 1, got nothing", "b: expected nothing, got 1"]),
        ({"a": [1, 2]}, {"a": [1]}, True, ["a: expected 2 entries, got 1"]),
        ({"sha256": "0a"}, {"sha256": "0b"}, False, []),
        ({"sha256": "0a"}, {"sha256": "0b"}, True, ['sha256: expected "0a", got "0b"']),
        ({"sha256": "0a"}, {}, False, ['sha256: expected "0a", got nothing']),
        ({"lr": 1.0}, {"lr": 1.0000001}, False, ["lr: expected 1.0, got 1.0000001"]),
        ({"a": (0.0).hex()}, {"a": (-1e-5).hex()}, False, 1),
        ({"a": "nan"}, {"a": (1.0).hex()}, False, 1),
    ],
)
def test_differences_are_named_by_their_path(
    expected: Any, got: Any, exact: bool, said: list[str] | int
) -> None:
    found = list(differences(expected, got, exact=exact))
    assert (len(found) if isinstance(said, int) else found) == said
