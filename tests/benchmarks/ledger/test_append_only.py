"""No commit takes a row of the ledger away, or changes one, but for the exceptions named here."""

from __future__ import annotations

import json
import shutil
import subprocess
from copy import deepcopy
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.ledger.rows import Row

ROOT = Path(__file__).parents[3]
RESULTS = "benchmarks/results"

# The exceptions that there were, each in one commit. A subject took its op's name. git's rename
# does not see it (every line changed, and git compares pieces of 64 bytes), so the file is
# followed by its name.
RENAMED = {"mi_loss": "boltzmann"}
# Rows of schema 1 took the present layout (`of_first_layout`), and rows of the methods' benchmark
# got the configs that their digests stood for (`recipes`).
GIVEN = {"methods": "recipes"}
# A subject of three rows went with its benchmark: no page showed them, and nothing read them.
DROPPED = {"cpu_shares"}


def _git(*arguments: str, root: Path = ROOT) -> str:
    if not (root / ".git").exists():
        pytest.skip("no git history here: an archive of the sources")
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def renamed(line: str) -> str:
    """Return the row under its subject's present name: in subject, command and tune's `op`."""
    row = json.loads(line)
    for old, new in RENAMED.items():
        if row["subject"] == old:
            row |= {"subject": new, "command": row["command"].replace(old, new)}
        if row["subject"] == "tune" and row["figures"].get("op") == old:
            row["figures"]["op"] = new
    return json.dumps(row)


def of_first_layout(row: Row) -> Row:
    """Return a row in the present layout, but for the machine's class, which follows from the rest.

    Schema 1 had versions among the machine's fields, -dirty in the commit, and no run's id.
    """
    if row.get("schema") != 1:
        return row
    machine = dict(row["machine"])
    versions = {name: machine.pop(name) for name in ("python", "torch", "cuda")}
    commit = row["commit"]
    return row | {
        "schema": 2,
        "run_id": None,
        "commit": commit.removesuffix("-dirty") or None if commit else None,
        "dirty": (commit or "").endswith("-dirty"),
        "machine": machine,
        "versions": {name: version for name, version in versions.items() if version},
    }


def is_kept(before: str, after: str) -> bool:
    """Return whether `after` is the row `before`, as it was or as an exception made it anew."""
    if before == after:
        return True
    now = json.loads(after)
    for then in map(json.loads, (before, renamed(before))):
        given = GIVEN.get(then["subject"])
        same = deepcopy(now)
        if given is not None and given not in then["figures"]:
            same["figures"].pop(given, None)
        if then.get("schema") == 1 and same.get("schema") == 2:
            same.pop("machine_class")
            then = of_first_layout(then)
        if then == same:
            return True
    return False


def lost(before: list[str], after: list[str]) -> list[str]:
    """Return the rows of `before` that `after` does not have, or not in that order."""
    rest = iter(after)
    return [row for row in before if not any(is_kept(row, found) for found in rest)]


def path_after(name: str, present: list[str]) -> str:
    """The file that has the rows of `name`: itself where it is still there, else the renamed."""
    stem = Path(name).stem
    return name if name in present else f"{RESULTS}/{RENAMED.get(stem, stem)}.jsonl"


def ledgers_of(commit: str, root: Path) -> list[str]:
    """Return the ledgers that a commit has and that are to stay."""
    names = _git("ls-tree", "--name-only", commit, f"{RESULTS}/", root=root).splitlines()
    return [name for name in names if name.endswith(".jsonl") and Path(name).stem not in DROPPED]


def taken_away(since: str, root: Path = ROOT) -> list[str]:
    """`COMMIT FILE` where a commit after `since` has not all rows that one of its parents has."""
    log = ["log", "-m", "--no-renames", "--numstat", "--format=%x00%H %P", f"{since}..HEAD"]
    blocks = _git(*log, "--", f"{RESULTS}/*.jsonl", root=root).split("\0")[1:]
    suspects = {
        head: None
        for head, *counts in map(str.splitlines, blocks)
        if any(count and count.split("\t")[1] != "0" for count in counts)
    }
    found = []
    for commit, *parents in map(str.split, suspects):
        present = ledgers_of(commit, root)
        for parent in parents:
            for name in ledgers_of(parent, root):
                before = _git("show", f"{parent}:{name}", root=root).splitlines()
                now = path_after(name, present)
                after = _git("show", f"{commit}:{now}", root=root) if now in present else ""
                found += [f"{commit} {name}"] * bool(lost(before, after.splitlines()))
    return found


def test_rows_that_were_committed_are_still_there() -> None:
    present = [f"{RESULTS}/{path.name}" for path in (ROOT / RESULTS).glob("*.jsonl")]
    for name in ledgers_of("HEAD", ROOT):
        now = ROOT / path_after(name, present)
        rows = now.read_text().splitlines() if now.exists() else []
        assert not lost(_git("show", f"HEAD:{name}").splitlines(), rows), name


def test_no_commit_took_a_row_away() -> None:
    """Since there is a schema; before that rows of dropped experiments went with them."""
    added = _git("log", "--diff-filter=A", "--format=%H", "--", "benchmarks/ledger.schema.json")
    if not added:
        pytest.skip("the ledger's schema is not committed in the history that is here")
    assert taken_away(added.split()[-1]) == []


def old_row(ms: int, subject: str = "mi_loss", **figures: Any) -> str:
    row = {"subject": subject, "command": f"m3i-fast bench {subject}", "figures": {"ms": ms}}
    return json.dumps(row | {"figures": {"ms": ms, **figures}})


@pytest.mark.parametrize(
    ("after", "loses"),
    [
        ({"boltzmann": [renamed(old_row(1)), renamed(old_row(2))]}, False),
        ({"boltzmann": [renamed(old_row(1)), old_row(9, "boltzmann"), renamed(old_row(2))]}, False),
        ({"boltzmann": [renamed(old_row(2)), renamed(old_row(1))]}, True),
        ({"boltzmann": [renamed(old_row(1))]}, True),
        ({"boltzmann": [renamed(old_row(1)), renamed(old_row(3))]}, True),
        ({"boltzmann": [renamed(old_row(1)), old_row(2, "gaussian")]}, True),
        ({"gaussian": [old_row(1, "gaussian"), old_row(2, "gaussian")]}, True),
        ({}, True),
    ],
)
def test_a_rename_keeps_every_row_but_for_its_name(
    after: dict[str, list[str]], loses: bool, tmp_path: Path
) -> None:
    def commit(files: dict[str, list[str]]) -> None:
        shutil.rmtree(tmp_path / RESULTS, ignore_errors=True)
        (tmp_path / RESULTS).mkdir(parents=True)
        for subject, rows in files.items():
            (tmp_path / RESULTS / f"{subject}.jsonl").write_text("\n".join(rows) + "\n")
        _git("add", "--all", root=tmp_path)
        author = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        _git(*author, "commit", "--quiet", "--allow-empty", "--message=x", root=tmp_path)

    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    commit({})
    tuned = [old_row(3, "tune", op="mi_loss"), old_row(4, "tune", op="dcnv3")]
    commit({"mi_loss": [old_row(1), old_row(2)], "tune": tuned})
    commit({**after, "tune": [renamed(tuned[0]), tuned[1]]})
    head = _git("rev-parse", "HEAD", root=tmp_path).strip()
    lost_here = [f"{head} {RESULTS}/mi_loss.jsonl"] if loses else []
    assert taken_away("HEAD~2", tmp_path) == lost_here
    commit({**after, "tune": tuned})  # a name that was changed back is a row that is lost
    assert f"{RESULTS}/tune.jsonl" in taken_away("HEAD~1", tmp_path)[-1]


def test_lost_rows_are_seen() -> None:
    a, b, c, x = (old_row(number, "speed") for number in range(4))
    assert lost([a, b], [a, x, b, c]) == []
    assert lost([a, b], [b, c, a]) == [b]
    assert lost([a, b], [a]) == [b]


FIRST = {
    "schema": 1,
    "subject": "methods",
    "commit": "0123456789ab-dirty",
    "machine": {"python": "3.11.7", "torch": "2.13.0", "cuda": None, "cpu": "AMD", "num_cores": 2},
    "time": "2026-11-26T01:28:24+00:00",
    "command": "m3i-fast bench methods",
    "figures": {"recipe": "0123abcd", "loss": 1.5},
}
PRESENT = {
    "schema": 2,
    "run_id": None,
    "time": FIRST["time"],
    "subject": "methods",
    "commit": "0123456789ab",
    "dirty": True,
    "command": FIRST["command"],
    "machine": {"cpu": "AMD", "num_cores": 2},
    "machine_class": "2 cores of AMD",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "figures": {"recipe": "0123abcd", "recipes": {"clip": {}}, "loss": 1.5},
}


def _with(row: Row, path: str, value: Any) -> Row:
    """Return the row with the field of that path changed."""
    changed = deepcopy(row)
    *above, name = path.split(".")
    reduce(dict.__getitem__, above, changed)[name] = value
    return changed


@pytest.mark.parametrize(
    ("before", "path", "value", "kept"),
    [
        (FIRST, "dirty", True, True),
        (FIRST, "dirty", False, False),
        (FIRST, "commit", "0123456789ac", False),
        (FIRST, "time", "2026-11-26T01:28:25+00:00", False),
        (FIRST, "machine.num_cores", 3, False),
        (FIRST, "versions.torch", "2.14.0", False),
        (FIRST, "figures.loss", 1.6, False),
        (FIRST, "figures.note", "new", False),
        (FIRST, "run_id", "0" * 16, False),
        (PRESENT | {"figures": FIRST["figures"]}, "dirty", True, True),
        (PRESENT | {"figures": FIRST["figures"]}, "machine_class", "3 cores of AMD", False),
        (PRESENT | {"figures": FIRST["figures"]}, "figures.loss", 1.6, False),
        (PRESENT, "figures.recipes", {"clip": {"seed": 1}}, False),
    ],
)
def test_rows_made_anew_differ_in_nothing_but_the_layout_and_the_configs(
    before: Row, path: str, value: Any, kept: bool
) -> None:
    after = json.dumps(_with(PRESENT, path, value))
    assert (lost([json.dumps(before)], [after]) == []) == kept
    other = json.dumps(_with(json.loads(after), "subject", "gate"))  # has no configs to be given
    assert lost([json.dumps({**before, "subject": "gate"})], [other]) != []
