"""Groups of tests: what each depends on, and when it is stale."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from scripts import checks
from tests.shared.groups import InputsOnly

PYTEST_GROUPS = [name for name, group in checks.GROUPS.items() if not group.module]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two modules, and a test of the group cuda that imports one and reads a kernel."""
    files = {
        "m3i_fast/__init__.py": "",
        "m3i_fast/used.py": "import torch\n",
        "m3i_fast/other.py": "",
        "cuda/kernel.cu": "one",
        "docs/page.md": "",
        "scripts/checks.py": "",
        "tests/conftest.py": "",
        "tests/test_kernel.py": "import m3i_fast.used\n@pytest.mark.cuda\ndef test(): ...\n",
        "tests/test_gate.py": "import m3i_fast.other\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "PASSED", tmp_path / "passed.json")
    monkeypatch.setattr(checks, "tracked", lambda: frozenset(files))
    monkeypatch.setattr(checks, "tools", lambda: ["g++ 12"])
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for function in (checks.modules, checks.imported, checks.test_files, checks.input_files):
        function.cache_clear()


def test_inputs_are_the_tests_their_imports_and_what_they_read(checkout: Path) -> None:
    assert checks.input_files("cuda") == {
        *("tests/conftest.py", "tests/test_kernel.py"),
        *("m3i_fast/__init__.py", "m3i_fast/used.py", "cuda/kernel.cu"),
    }


@pytest.mark.parametrize(
    ("file", "is_stale"),
    [
        *[("m3i_fast/used.py", True), ("cuda/kernel.cu", True), ("tests/conftest.py", True)],
        *[("tests/test_kernel.py", True), ("m3i_fast/other.py", False), ("docs/page.md", False)],
    ],
)
def test_a_group_is_stale_after_a_change_of_an_input(
    checkout: Path, file: str, is_stale: bool
) -> None:
    assert "cuda" in checks.stale()
    checks.PASSED.write_text(json.dumps({"cuda": checks.digest("cuda")}))
    assert "cuda" not in checks.stale()
    with (checkout / file).open("a") as text:
        text.write("# changed\n")
    forget()
    assert ("cuda" in checks.stale()) == is_stale


def test_a_group_is_stale_with_another_compiler(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.PASSED.write_text(json.dumps({"cuda": checks.digest("cuda")}))
    monkeypatch.setattr(checks, "tools", lambda: ["g++ 13"])
    assert "cuda" in checks.stale()


def test_only_a_whole_group_that_passed_is_written_down(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[str] = []
    monkeypatch.setattr(checks, "run", lambda name, arguments=(): run.append(name))
    monkeypatch.setattr(checks, "due", lambda: {"wheels": "its turn"})
    checks.main(["cuda", "-x"])
    checks.main(["ci"])
    assert run == ["cuda", "wheels"] and not checks.PASSED.exists()
    checks.main(["cuda"])
    assert set(checks.passed()) == {"cuda"} and "cuda" not in checks.stale()

    def fail(name: str, arguments: object = ()) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(checks, "run", fail)
    with pytest.raises(SystemExit):
        checks.main(["matrix"])
    assert set(checks.passed()) == {"cuda"}


@pytest.mark.parametrize("name", PYTEST_GROUPS)
def test_each_group_has_tests_that_its_inputs_hold(name: str) -> None:
    files = checks.test_files(name)
    assert files and set(files) <= checks.input_files(name)


def test_a_file_that_is_no_input_fails_the_test_that_reads_it() -> None:
    held = InputsOnly("cuda")
    # This process has modules of all groups.
    held.others = {file for file in held.others if file.startswith("docs/")}
    (checks.ROOT / "m3i_fast" / "ops" / "library.py").read_text()
    held.pytest_runtest_teardown()
    (checks.ROOT / "docs" / "index.md").read_text()
    with pytest.raises(pytest.fail.Exception, match=r"add to `reads` \['docs/index\.md'\]"):
        held.pytest_runtest_teardown()


def test_ci_runs_each_group_in_its_turn_and_what_a_change_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *author, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(file: str) -> set[str]:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.read_text() + "more" if path.is_file() else "")
        git("add", "--all")
        git("commit", "--quiet", "--message", file)
        return set(checks.due())

    monkeypatch.setattr(checks, "ROOT", tmp_path)
    git("init", "--quiet")
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "passed").write_text("")
    assert commit("README.md") >= {"first-contact", "wheels"}  # nothing has passed
    (tmp_path / ".ci" / "passed").write_text(git("rev-parse", "HEAD"))
    turns = [commit("README.md") for _ in checks.GROUPS]
    assert [len(names) for names in turns] == [1] * len(turns)
    assert set.union(*turns) == set(checks.GROUPS)
    assert "first-contact" in commit("cuda/kernel.cu") and "wheels" not in commit("docs.md")
    assert {"first-contact", "wheels"} <= commit("pyproject.toml")
