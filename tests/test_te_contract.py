"""`make te-contract`, as far as it goes without its environment: what it builds, and when again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts import te_contract


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the script reads."""
    for name in ("pyproject.toml", "CMakeLists.txt"):
        shutil.copy(te_contract.ROOT / name, tmp_path / name)
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr(te_contract, "ROOT", tmp_path)
    return tmp_path


def test_the_release_is_pyprojects_and_has_to_be_exact(checkout: Path) -> None:
    project = checkout / "pyproject.toml"
    text = project.read_text()
    assert f"=={te_contract.release()}" in text
    project.write_text(text.replace(f"=={te_contract.release()}", ""))
    with pytest.raises(SystemExit, match=r"pyproject\.toml: expected an exact release"):
        te_contract.release()


def test_another_release_is_built_anew_and_other_sources_are_our_package_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.install.ROOT", checkout)
    before = te_contract.wanted_state()
    assert te_contract.wanted_state() == before
    (checkout / "cuda" / "new.cu").write_text("// new\n")
    after = te_contract.wanted_state()
    assert after["te"] == before["te"] and after["cpp"] != before["cpp"]
    project = checkout / "pyproject.toml"
    project.write_text(project.read_text().replace(te_contract.release(), "2.21.0"))
    assert te_contract.wanted_state()["te"] != before["te"]
