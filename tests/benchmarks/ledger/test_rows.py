"""Rows that are appended are read back; wrong ones are never written."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from m3i_fast.benchmarks.ledger import machine
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger import schema as ledger_schema
from m3i_fast.benchmarks.ledger.rows import append_row, read_rows
from m3i_fast.recipes import demo

ROOT = Path(__file__).parents[3]
RESULTS = "benchmarks/results"
FIELDS = [
    "schema", "run_id", "time", "subject", "commit", "dirty", "command", "machine",
    "machine_class", "versions", "figures",
]  # fmt: skip
TIMING = {"median_ms": 1.5, "p20_ms": 1, "p80_ms": 2.0, "num_samples": 3, "samples_ms": [1.0, 2]}
CARD = {"name": "H100", "memory_bytes": 85 << 30, "power_limit_w": 700.0, "driver": "580.95"}


@pytest.fixture(scope="module")
def good() -> ledger.Row:
    row = ledger.make_row("speed", {"size": 3, "timings": {"ours": TIMING}}, command="x")
    row["machine"]["cards"] = [CARD]
    return json.loads(json.dumps(row))  # type: ignore[no-any-return]


# ---- Writing -------------------------------------------------------------------------------------


def test_row_has_what_a_reader_needs(tmp_path: Path) -> None:
    path = append_row("speed", {"ms": 1.5}, command="python -m speed", folder=tmp_path)
    assert path == tmp_path / "speed.jsonl"
    (row,) = read_rows("speed", folder=tmp_path)
    assert list(row) == FIELDS
    assert (row["schema"], row["subject"], row["command"]) == (2, "speed", "python -m speed")
    assert row["figures"] == {"ms": 1.5}
    assert row["versions"]["torch"] == torch.__version__
    found = row["machine"]
    assert found["num_cores"] >= 1 and found["ram_bytes"] > 1 << 28
    assert row["machine_class"] == machine.machine_class(found)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(row["time"])
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)


def test_rows_of_a_process_have_one_run_and_no_name_of_the_host(tmp_path: Path) -> None:
    for number in range(2):
        append_row("speed", {"ms": number}, folder=tmp_path)
    first, second = read_rows("speed", folder=tmp_path)
    assert first["run_id"] == second["run_id"]
    name = subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
    assert name and name not in (tmp_path / "speed.jsonl").read_text()


def test_config_is_kept_whole_with_its_hash(tmp_path: Path) -> None:
    cfg = demo()
    for config in (cfg, cfg, demo(seed=3)):
        append_row("speed", {}, config=config, telemetry={"throttled": False}, folder=tmp_path)
    first, again, other = read_rows("speed", folder=tmp_path)
    assert first["config"] == json.loads(cfg.to_json())
    assert first["config_hash"] == again["config_hash"] != other["config_hash"]
    assert first["telemetry"] == {"throttled": False}


def test_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    append_row("speed", {}, folder=tmp_path)
    (row,) = read_rows("speed", folder=tmp_path)
    head = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert head.startswith(row["commit"] or "")


def test_rows_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        writers = [
            pool.submit(append_row, "speed", {"i": i, "pad": "x" * 9000}, folder=tmp_path)
            for i in range(24)
        ]
    assert all(writer.result().is_file() for writer in writers)
    assert sorted(row["figures"]["i"] for row in read_rows("speed", folder=tmp_path)) == [
        *range(24)
    ]


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), Path("x")])
def test_figures_json_cannot_hold_are_refused(figure: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figures of speed: expected finite JSON values"):
        append_row("speed", {"ms": figure}, folder=tmp_path)
    assert not (tmp_path / "speed.jsonl").exists()


def test_a_row_against_the_schema_is_not_written(tmp_path: Path) -> None:
    figures = {"timings": {"ours": {**TIMING, "median_ms": "fast"}}}
    place = "figures.timings.ours.median_ms: expected number, got 'fast'"
    with pytest.raises(ValueError, match=place):
        append_row("speed", figures, folder=tmp_path)
    assert not (tmp_path / "speed.jsonl").exists()


def test_subject_is_a_file_stem(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subject: .* got '\.\./speed'"):
        append_row("../speed", {}, folder=tmp_path)


def test_command_names_the_module(tmp_path: Path) -> None:
    (tmp_path / "speed.py").write_text(
        "from pathlib import Path\n"
        "from m3i_fast.benchmarks.ledger.rows import append_row\n"
        "append_row('speed', {}, folder=Path('ledger'))\n"
    )
    subprocess.run(
        [sys.executable, "-m", "speed", "--size", "a b"], cwd=tmp_path, check=True, timeout=120
    )
    (row,) = read_rows("speed", folder=tmp_path / "ledger")
    assert row["command"] == "python -m speed --size 'a b'"


# ---- Reading -------------------------------------------------------------------------------------


def test_no_ledger_has_no_rows(tmp_path: Path) -> None:
    assert list(read_rows("speed", folder=tmp_path)) == []
    assert ledger.subjects(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "expected a row"), ("[]", "expected a row"), ('{"schema": 1}', "schema 2, got 1")],
)
def test_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = append_row("speed", {}, folder=tmp_path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=f"speed.jsonl:2: .*{message}"):
        list(read_rows("speed", folder=tmp_path))


def test_ledger_is_the_checkouts() -> None:
    assert ledger.results_dir() == ROOT / RESULTS


def test_ledger_of_an_installed_package_is_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site" / "benchmarks" / "ledger" / "rows.py"
    monkeypatch.setattr(ledger, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    path = append_row("speed", {})
    assert path.resolve() == tmp_path / RESULTS / "speed.jsonl"
    assert json.loads(path.read_text())["subject"] == "speed"


def test_settings_tell_what_was_measured_from_what_was_found() -> None:
    rows = list(read_rows("dcnv3"))
    keys = {json.dumps(ledger.settings_of(row), sort_keys=True) for row in rows}
    assert len(keys) == 24  # four layers, three dtypes, two passes
    wanted = {"height": 56, "dtype": "float32", "pass": "forward"}
    alike = [row for row in rows if wanted.items() <= ledger.settings_of(row).items()]
    newest = ledger.newest(rows, **wanted)
    assert newest is not None and len(alike) > 1
    assert newest["time"] == max(row["time"] for row in alike)


# ---- The schema ----------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ledger.subjects())
def test_every_row_of_the_ledger_is_as_the_schema_says(subject: str) -> None:
    validator = jsonschema.Draft202012Validator(ledger_schema.schema())
    for number, row in enumerate(read_rows(subject), start=1):
        assert not [error.message[:200] for error in validator.iter_errors(row)], number
        assert row["subject"] == subject


WRONG: list[tuple[str, Any]] = [
    ("schema", 1), ("schema", None), ("run_id", "xyz"), ("run_id", 3), ("time", "yesterday"),
    ("time", "2026-11-26T01:28:24"), ("subject", "a b"), ("commit", "HEAD"), ("dirty", "no"),
    ("dirty", 1), ("command", ""), ("machine_class", ""), ("machine", []), ("machine.gpu", 1),
    ("machine.num_cores", 0), ("machine.num_cores", 1.5), ("machine.num_cores", True),
    ("machine.cards", {}), ("machine.cards.0.name", None), ("machine.cards.0.colour", "red"),
    ("machine.cards.0.power_limit_w", -1), ("versions", {}), ("versions.torch", ""),
    ("versions.te", 2), ("figures", []), ("figures.timings", 3), ("figures.timings.ours", {}),
    ("figures.timings.ours.median_ms", -1.0), ("figures.timings.ours.median_ms", None),
    ("figures.timings.ours.num_samples", 0), ("figures.timings.ours.samples_ms", [1, "2"]),
    ("figures.timings.ours.mean_ms", 1.0), ("figures.final_loss", "low"), ("config", "demo"),
    ("config_hash", "0"), ("telemetry", 1), ("colour", "red"),
]  # fmt: skip
RIGHT: list[tuple[str, Any]] = [
    ("run_id", None), ("commit", None), ("machine.num_cores", 2.0), ("machine.note", "new"),
    ("figures.final_loss", None), ("figures.other", [1, {"a": None}]), ("telemetry", {"hz": 2}),
    ("machine.cards", []), ("config", {}),
]  # fmt: skip


def _with(row: ledger.Row, path: str, value: Any) -> ledger.Row:
    changed = deepcopy(row)
    *above, name = path.split(".")
    inner: Any = changed
    for step in above:
        inner = inner[int(step)] if isinstance(inner, list) else inner[step]
    inner[name] = value
    return changed


@pytest.mark.parametrize(("path", "value"), WRONG + RIGHT)
def test_our_check_says_what_jsonschema_says(good: ledger.Row, path: str, value: Any) -> None:
    changed = _with(good, path, value)
    validator = jsonschema.Draft202012Validator(ledger_schema.schema())
    expected = {
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path)
        for error in validator.iter_errors(changed)
    }
    said = list(ledger_schema.complaints(changed))
    assert bool(expected) == bool(said) == ((path, value) in WRONG)
    assert all(any(place.lstrip(".") in line for line in said) for place in expected)


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_needed(good: ledger.Row, field: str) -> None:
    assert not list(ledger_schema.complaints(good))
    less = {name: value for name, value in good.items() if name != field}
    assert list(ledger_schema.complaints(less)) == [f"{field}: expected a value, got none"]


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(ledger_schema.schema())


def test_an_unknown_keyword_of_the_schema_is_an_error() -> None:
    with pytest.raises(ValueError, match="the keyword maximum is not known"):
        list(ledger_schema.complaints(3, {"maximum": 2}))


# ---- Machines ------------------------------------------------------------------------------------


def test_what_nvidia_smi_says_is_read_and_what_it_cannot_say_left_out() -> None:
    text = "GPU-aa, 580.95.05, 700.00, 1980, 96.00.74.00.01\nGPU-bb, 580.95.05, [N/A], [N/A], [N/A]"
    assert machine.parse_nvidia_smi(text) == {
        "aa": {
            "driver": "580.95.05",
            "vbios": "96.00.74.00.01",
            "power_limit_w": 700.0,
            "max_sm_clock_mhz": 1980.0,
        },
        "bb": {"driver": "580.95.05"},
    }
    assert machine.parse_nvidia_smi("No devices were found") == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, "8 x H100 at 700 W, 64 cores of X"),
        ({"ram_bytes": 1, "host": "0" * 16}, "8 x H100 at 700 W, 64 cores of X"),
        ({"cards": []}, "8 x H100, 64 cores of X"),
        ({"cards": [CARD, {**CARD, "power_limit_w": 500.0}]}, "8 x H100 at 500 W, 64 cores of X"),
        ({"gpu": None, "num_gpus": 0, "cards": []}, "64 cores of X"),
    ],
)
def test_class_of_a_machine(change: dict[str, Any], named: str) -> None:
    found = {"cpu": "X", "num_cores": 64, "gpu": "H100", "num_gpus": 8, "cards": [CARD] * 8}
    assert machine.machine_class({**found, **change}) == named


def test_a_command_says_nothing_of_where_the_machine_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")
    arguments = ["--data", "/a/b/data", "--out=/c/d/run", "--op", "dcnv3", "rel/path", "a/b,/c/d"]
    monkeypatch.setattr(sys, "argv", ["/e/bin/m3i-fast", "bench", *arguments])
    append_row("speed", {}, folder=tmp_path)
    (row,) = read_rows("speed", folder=tmp_path)
    told = "--data .../data --out=.../run --op dcnv3 rel/path a/b,.../d"
    assert row["command"] == f"m3i-fast bench {told}"
