"""What a release says of itself: one version, extras that exist, files that have a schema."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner

import m3i_fast
from scripts import wheel_matrix
from scripts.wheel_matrix import CASES, Case
from tests.shared.source_files import FILES

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def rows_of(page: str, head: str) -> list[list[str]]:
    """The cells of the table that begins with a head, a row a list."""
    _, _, after = (ROOT / page).read_text().partition(f"| {head} |")
    lines = after.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- The version ---------------------------------------------------------------------------------


def test_the_version_stands_in_one_place_and_all_others_agree() -> None:
    (wanted,) = re.findall(r'^version = "(.+)"$', PROJECT, re.M)
    said = {
        "m3i_fast.__version__": m3i_fast.__version__,
        "installed": version("m3i-fast"),
        "CITATION.cff": CITATION["version"],
        "CHANGELOG.md": re.findall(
            r"^## \[(\d\S+)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.M
        )[0],
    }
    pages = [*(ROOT / "launch").rglob("*"), ROOT / "docs" / "train" / "clusters.md"]
    for page in filter(Path.is_file, pages):
        for number, tag in enumerate(re.findall(r"m3i-fast:(\d[\w.]*)", page.read_text())):
            said[f"{page.name}, image {number}"] = tag
    assert len(said) > 6
    assert {place: v for place, v in said.items() if v != wanted} == {}


def test_the_day_of_the_release_is_one() -> None:
    (day,) = re.findall(
        rf"^## \[{re.escape(m3i_fast.__version__)}\] - (\S+)$",
        (ROOT / "CHANGELOG.md").read_text(),
        re.M,
    )
    assert CITATION["date-released"] == day


def test_the_version_is_read_without_torch() -> None:
    code = "import m3i_fast, sys; m3i_fast.__version__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- Extras --------------------------------------------------------------------------------------


def test_the_table_of_extras_has_each_of_them() -> None:
    named = [re.findall(r"`([\w-]+)`", row[0]) for row in rows_of("docs/start/install.md", "extra")]
    extras = set(metadata("m3i-fast").get_all("Provides-Extra") or [])
    assert {name for names in named for name in names} == extras


def test_an_extra_that_an_error_names_is_there() -> None:
    extras = set(metadata("m3i-fast").get_all("Provides-Extra") or [])
    asked = {
        name: file
        for file, path in FILES.items()
        for name in re.findall(
            r'extra(?:: str )?=\s?"([\w-]+)"|m3i-fast\[([\w,-]+)\]', path.read_text()
        )
        for name in "".join(name).split(",")
    }
    assert {"data", "timm", "cloud"} <= asked.keys()
    assert {name: file for name, file in asked.items() if name not in extras} == {}


# ---- Files for people and for GitHub -------------------------------------------------------------

SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    ".github/workflows/ci.yml": "github-workflows",
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    **{
        f".github/ISSUE_TEMPLATE/{name}.yml": "github-issue-forms"
        for name in ("bug", "idea", "slow")
    },
}


def schema_errors(file: Path, schema: str) -> str:
    """What a file lacks by a schema that its readers publish; empty where it is as it should be."""
    done = CliRunner().invoke(check_jsonschema, ["--builtin-schema", f"vendor.{schema}", str(file)])
    return done.output if done.exit_code else ""


@pytest.mark.parametrize("file", SCHEMAS)
def test_a_file_is_as_its_readers_schema_says(file: str, tmp_path: Path) -> None:
    assert schema_errors(ROOT / file, SCHEMAS[file]) == ""
    wrong = yaml.safe_load((ROOT / file).read_text())
    wrong["of_no_schema"] = wrong.pop(next(iter(wrong)))
    (tmp_path / "wrong.yml").write_text(yaml.safe_dump(wrong))
    assert schema_errors(tmp_path / "wrong.yml", SCHEMAS[file])


def test_every_file_for_github_has_been_checked() -> None:
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / ".github").rglob("*.yml")}
    assert there == SCHEMAS.keys() - {"CITATION.cff"}


def test_the_workflow_runs_what_ci_runs_and_may_only_read() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow = yaml.safe_load(text)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    assert workflow["permissions"] == {"contents": "read"}
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)
    (pythons,) = [step["with"]["python-version"] for step in steps if "setup-py" in str(step)]
    assert set(pythons.split()) == {case.python for case in CASES if not case.nightly}


# ---- What `make wheels` tries --------------------------------------------------------------------


def test_each_change_meets_two_pythons_and_two_torches() -> None:
    daily = [case for case in CASES if not case.nightly]
    for cases in (daily, CASES):
        assert len({case.python for case in cases}) > 1 and len({case.torch for case in cases}) > 1
    oldest = (
        re.search(r'requires-python = ">=(\S+)"', PROJECT),
        re.search(r'"torch>=(\S+?)"', PROJECT),
    )
    assert all(oldest)
    assert {(case.python, case.torch) for case in CASES} >= {tuple(m[1] for m in oldest if m)}


def test_the_page_about_releases_has_the_matrix() -> None:
    rows = rows_of("docs/reference/releasing.md", "Python")
    assert [(row[0], row[1].split(",")[0]) for row in rows] == [(c.python, c.torch) for c in CASES]
    assert ["every change" in row[2] for row in rows] == [not case.nightly for case in CASES]
    assert ["CPU" in row[1] for row in rows] == [not case.cuda for case in CASES]


def test_a_python_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"python3\.99: expected on the PATH .*got none"):
        wheel_matrix.find_python("3.99")


@pytest.mark.parametrize(
    ("tag", "allowed"),
    [("manylinux_2_28_x86_64", True), ("manylinux_2_17_x86_64", True)]
    + [("manylinux_2_29_x86_64", False), ("manylinux_2_5_x86_64", True)],
)
def test_symbols_of_a_newer_linux_are_refused(
    tag: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: dict[str, Any] = {"sym_tag": tag, "versioned_symbols": {"libc.so.6": ["GLIBC_2.29"]}}
    monkeypatch.setattr(wheel_matrix, "symbols_asked", lambda _: facts)
    if allowed:
        wheel_matrix.expect_floor(Path("m3i_fast.whl"))
        return
    with pytest.raises(RuntimeError, match=r"got manylinux_2_29_x86_64: .*GLIBC_2\.29"):
        wheel_matrix.expect_floor(Path("m3i_fast.whl"))


def test_a_file_that_is_not_in_the_package_is_noticed(tmp_path: Path) -> None:
    """In a process of its own, since an audit hook stays."""
    package = tmp_path / "m3i_fast"
    package.mkdir()
    (package / "page.css").write_text("p { color: red }")
    code = (
        "import json, pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from scripts import wheel_smoke\n"
        "package = pathlib.Path(sys.argv[2]); wheel_smoke.watch_files()\n"
        "(package / 'page.css').read_text()\n"
        "print(json.dumps(wheel_smoke.data_files(package)))\n"
        "for lost in ('m3i_fast/page.html', 'cuda/dcnv3/tiles.json'):\n"
        "    wheel_smoke._opened.clear()\n"
        "    try:\n        (package.parent / lost).read_text()\n"
        "    except FileNotFoundError:\n        pass\n"
        "    try:\n        wheel_smoke.data_files(package)\n"
        "    except FileNotFoundError as error:\n        print(lost in str(error))\n"
    )
    command = [sys.executable, "-c", code, ROOT, package]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [json.dumps(["m3i_fast/page.css"]), "True", "True"]


def test_no_environment_is_left_of_a_case_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(wheel_matrix, "FOLDER", tmp_path)

    def broken(case: Case, where: Path) -> Path:
        where.mkdir()
        raise RuntimeError("no torch of that version")

    monkeypatch.setattr(wheel_matrix, "make_environment", broken)
    with pytest.raises(RuntimeError, match="no torch"):
        wheel_matrix.try_case(CASES[0], tmp_path / "m3i_fast-0-py3-none-any.whl", cuda=False)
    assert list(tmp_path.iterdir()) == []
