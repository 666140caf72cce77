"""build/cuda, as far as it goes without it: what it is made from, and what makes it anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts import cuda_environment, first_contact, te_contract


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the scripts read."""
    for name in ("pyproject.toml", "CMakeLists.txt", "constraints-cuda.txt"):
        shutil.copy(cuda_environment.ROOT / name, tmp_path / name)
    (tmp_path / "cuda" / "null").mkdir(parents=True)
    monkeypatch.setattr(cuda_environment, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_environment, "CONSTRAINTS", tmp_path / "constraints-cuda.txt")
    monkeypatch.setattr("scripts.install.ROOT", tmp_path)
    return tmp_path


def test_the_release_is_pyprojects_and_has_to_be_exact(checkout: Path) -> None:
    project = checkout / "pyproject.toml"
    text = project.read_text()
    assert f"=={te_contract.release()}" in text
    project.write_text(text.replace(f"=={te_contract.release()}", ""))
    with pytest.raises(SystemExit, match=r"pyproject\.toml: expected an exact release"):
        te_contract.release()


def differing(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {part for part in before if before[part] != after[part]}


def test_other_versions_make_it_anew_and_other_sources_our_package_alone(checkout: Path) -> None:
    before = cuda_environment.wanted_state()
    assert cuda_environment.wanted_state() == before
    (checkout / "cuda" / "new.cu").write_text("// new\n")
    assert differing(before, cuda_environment.wanted_state()) == {"cpp"}
    (checkout / "cuda" / "new.cu").unlink()
    pins = checkout / "constraints-cuda.txt"
    pins.write_text(pins.read_text().replace("torch==2.15.0", "torch==2.15.1"))
    assert differing(before, cuda_environment.wanted_state()) == {"torch"}


def test_a_new_dependency_of_the_package_makes_it_anew(checkout: Path) -> None:
    before = cuda_environment.wanted_state()
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace('"psutil",', '"psutil", "one-more>=2",'))
    assert "one-more>=2" in cuda_environment.packages()
    assert "torch" in differing(before, cuda_environment.wanted_state())


def test_the_null_runtime_is_built_apart_from_the_package(checkout: Path) -> None:
    before = cuda_environment.wanted_state()
    (checkout / "cuda" / "null" / "new.cpp").write_text("// new\n")
    assert cuda_environment.wanted_state() == before


def test_the_constraints_pin_exactly() -> None:
    lines = cuda_environment.CONSTRAINTS.read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(pin.count("==") == 1 for pin in pins) and "torch==2.15.0" in pins


def test_nightly_tests_are_left_out_unless_a_marker_is_asked_for() -> None:
    plain = first_contact.pytest_arguments(["-k", "demo", "--maxfail=1"])
    assert plain[7:] == ["-m", "not nightly", "tests/null_cuda", "-k", "demo", "--maxfail=1"]
    for asked in (["-m", "nightly"], ["-mnightly"]):
        assert first_contact.pytest_arguments(asked)[7:] == ["tests/null_cuda", *asked]
