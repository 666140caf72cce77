"""The ledger's page as a reader meets it, and its exports as their tools read them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.stats import Stats
from pytest_benchmark.storage.file import FileStorage

from m3i_fast.benchmarks.ledger import exports, page
from m3i_fast.benchmarks.ledger import readme_tables as readme
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger.history import common_settings, series_of
from m3i_fast.cli import bench
from tests.shared.chromium import check_page, skip_reason

SAMPLES = [1.5, 1.25, 1.75, 9.0, 1.5, 1.375, 1.625]  # ms


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of two subjects, two machine classes, two commits."""
    folder = tmp_path / "results"
    monkeypatch.setattr(ledger, "results_dir", lambda: folder)
    folder.mkdir()
    append(folder, "speed", timed(2.0), commit="aaaaaaa", time="2026-01-01T00:00:00+00:00")
    append(folder, "speed", timed(1.5))
    append(folder, "speed", timed(0.5), machine_class="64 cores of <another>")
    rate = {"median": 120.0, "ci_low": 100.0, "ci_high": 130.0}
    append(folder, "node", {"recipe": "demo", "images_per_s": {"alone": rate}, "seed": 3})
    append(folder, "waits", {"waited_ms": 12.5, "train_images_per_s": 80.0, "ok_ms": None})
    return folder


def timed(median: float) -> dict[str, Any]:
    timing = {"median_ms": median, "p20_ms": median / 2, "p80_ms": median * 2}
    timing |= {"num_samples": len(SAMPLES), "samples_ms": SAMPLES}
    return {"size": 64, "dtype": "float32", "timings": {"m3i_fast": timing}}


def append(folder: Path, subject: str, figures: dict[str, Any], **changes: Any) -> None:
    made = ledger.make_row(subject, figures, command=f"bench {subject}")
    made |= {"dirty": False, **changes}
    with (folder / f"{subject}.jsonl").open("a") as file:
        file.write(json.dumps(made) + "\n")


def test_rows_that_measured_the_same_are_one_series(rows: Path) -> None:
    other, own = series_of("speed")  # what was measured last comes first
    assert [point.value for point in own.points] == [2.0, 1.5]
    assert (own.points[0].low, own.points[0].high, own.points[0].commit) == (1.0, 4.0, "aaaaaaa")
    assert (own.name(), own.unit) == ("size 64, dtype float32", "ms")
    assert other.machine_class == "64 cores of <another>" and len(other.points) == 1
    (node,) = series_of("node")
    assert (node.name(), node.unit) == ("recipe demo, seed 3, images_per_s, alone", "a second")
    assert (node.points[0].low, node.points[0].high) == (100.0, 130.0)
    assert {(s.name(), s.unit) for s in series_of("waits")} == {
        ("waited", "ms"),
        ("train images", "a second"),
    }


def test_what_all_series_have_in_common_is_said_once(rows: Path) -> None:
    append(rows, "speed", timed(1.0) | {"size": 128})
    append(rows, "speed", timed(1.1))
    own = [series for series in series_of("speed") if "another" not in series.machine_class]
    assert common_settings(own) == {"dtype": "float32"}
    assert [series.name(["dtype"]) for series in own] == ["size 64", "size 128"]


def test_a_chart_has_a_mark_a_row_at_its_place(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readme.TABLES, "gpu", lambda: "On a GPU.")  # its predictions take long
    html = page.render()
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 5
    (own,) = (chart for chart in charts if chart.count("<circle") == 2)
    first, second = (float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', own))
    floor = page.HEIGHT - 1
    assert (floor - first) / (floor - second) == pytest.approx(2.0 / 1.5, rel=0.01)  # from zero
    assert own.count('class="spread"') == 2
    assert "2 ms (1 to 4), 2026-01-01, aaaaaaa" in own
    assert "64 cores of &lt;another&gt;" in html and "<another>" not in html


@pytest.mark.pages
@pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))
def test_page_of_the_real_ledger_reads_well_in_a_browser(tmp_path: Path) -> None:
    out = tmp_path / "ledger.html"
    assert bench.main(["page", "--out", str(out)]) == 0
    html = out.read_text()
    assert "http:" not in html and "https:" not in html
    views = check_page(out, tmp_path, num_figures=0)
    assert {view.width for view in views} == {360, 1280}
    assert all(view.screenshot.stat().st_size > 100_000 for view in views)
    for subject in ("dcnv3", "mask_mix", "methods"):
        assert f'<h2 id="{subject}">' in html
    assert len(re.findall("<svg", html)) > 50


def test_no_row_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    with pytest.raises(ValueError, match="no row in"):
        page.render()


# ---- Exports -------------------------------------------------------------------------------------


def test_mllog_has_a_line_a_row(rows: Path, tmp_path: Path) -> None:
    assert bench.main(["page", "--mllog", str(tmp_path / "x.log")]) == 0
    lines = (tmp_path / "x.log").read_text().splitlines()
    assert len(lines) == 5
    # As the reader of MLPerf's compliance checker takes a line apart.
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    for event in events:
        assert set(event) == {"namespace", "time_ms", "event_type", "key", "value", "metadata"}
        assert event["event_type"] == "POINT_IN_TIME" and isinstance(event["time_ms"], int)
        assert {"file", "lineno", "commit"} <= event["metadata"].keys()
    old = next(event for event in events if event["metadata"]["commit"] == "aaaaaaa")
    assert old["time_ms"] == 1767225600000 and old["metadata"]["size"] == 64
    assert old["value"]["timings"]["m3i_fast"]["median_ms"] == 2.0


def test_pytest_benchmark_reads_its_file(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".benchmarks"
    assert bench.main(["page", "--pytest-benchmark", str(folder / "machine" / "0001_a.json")]) == 0
    storage = FileStorage(str(folder), logger=None)
    ((_, found),) = storage.load("0001")
    (entry,) = found["benchmarks"]
    assert entry["fullname"] == "benchmarks/speed.py::speed[64-float32]"
    assert entry["group"] == "speed" and entry["params"] == {"size": 64, "dtype": "float32"}
    command = [sys.executable, "-m", "pytest_benchmark", "--storage", str(folder), "compare"]
    shown = subprocess.run([*command, "0001"], capture_output=True, text=True, check=True).stdout
    assert re.search(r"speed\[64-float32\].* 1[.,]5", shown)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8, 21])
def test_statistics_are_pytest_benchmarks(rows: Path, count: int) -> None:
    seconds = [sample / 1e3 for sample in (SAMPLES * 3)[:count]]
    ours = dict(exports.stats(seconds))
    theirs = Stats()
    for sample in seconds:
        theirs.update(sample)
    for name in Stats.fields:
        expected = getattr(theirs, name)
        same = expected if isinstance(expected, str) else pytest.approx(expected)
        assert ours[name] == same, name


def test_rows_without_samples_are_no_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    append(tmp_path, "speed", timed(1.0), machine_class="another")
    with pytest.raises(ValueError, match="no row with samples of"):
        exports.pytest_benchmark()


def test_readme_needs_a_checkout(rows: Path) -> None:
    with pytest.raises(ValueError, match="--readme: expected a checkout"):
        page.main(["--readme"])
