"""The demo as a person types it, on few concepts: files, figures, and the page in a browser."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from m3i_fast.cli import main
from m3i_fast.cli.demo import set_aside
from m3i_fast.engine.run.lock import RunLock
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import DEMO_MERGES, demo
from m3i_fast.report.evaluations.verdict import SOURCES
from tests.shared.chromium import check_page, skip_reason

MEASURES = (
    "knn_top1",
    "linear_top1",
    "caption_to_image_recall_at_1",
    "caption_to_image_recall_at_5",
    "image_to_caption_recall_at_5",
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demos into one directory; the first is set aside."""
    root = tmp_path_factory.mktemp("demo")
    openmoji.build(
        root / "data",
        limit=110,
        num_merges=DEMO_MERGES,
        context_length=demo().text.context_length,
    )
    for _ in range(2):
        arguments = ["--data", str(root / "data"), "--out", str(root / "run"), "--num-steps", "3"]
        assert main(["demo", *arguments]) == 0
    return root / "run"


@pytest.mark.matrix
def test_evaluation_has_every_figure(out: Path) -> None:
    figures = json.loads((out / "evaluation.json").read_text())
    for name in MEASURES:
        expected = {"trained", "untrained", "chance"} | {
            "knn_top1": {"pixels", "ema"},
            "linear_top1": {"ema"},
        }.get(name, set())
        assert figures[name].keys() == expected
        assert all(0 <= value <= 1 for value in figures[name].values())
    for name in ("scene_miou", "scene_patch_top1", "few_label_top1", "few_label_knn_top1"):
        assert figures[name].keys() == {"trained", "ema", "untrained", "chance", "pixels"}
        assert all(0 <= value <= 1 for value in figures[name].values())
    assert figures["caption_information_nats"].keys() == {"trained", "untrained", "chance"}
    assert figures["effective_rank"].keys() == {"trained", "ema", "untrained", "pixels"}
    others = {"ema", "untrained", "chance", "pixels"}
    for name in ("scene_miou", "knn_top1_hard", "patch_correspondence_centred_hard"):
        assert figures["trained_minus"][name].keys() == others
        assert figures[name].keys() == others | {"trained"}
    gallery = figures["held_out_concepts"]
    assert gallery == 22 and figures["train_images_per_s"] > 0
    assert figures["caption_to_image_recall_at_5"]["chance"] == pytest.approx(5 / gallery)
    assert json.loads((out / "config.json").read_text())["num_steps"] == 3


def test_the_demo_tells_its_data_and_how_to_repeat_its_steps(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("m3i_fast.planning.step_budget.step_seconds", lambda *_: 100.0)
    monkeypatch.setattr("m3i_fast.cli.demo.report", lambda run: ({}, run / "report.html"))
    data = str(out.parent / "data")
    assert main(["demo", "--data", data, "--out", str(out.parent / "timed")]) == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert re.search(rf"found openmoji\S* in {data}: [0-9]+ pictures to train on", printed)
    assert "--num-steps 12 repeats this run" in printed
    assert json.loads((out.parent / "timed" / "config.json").read_text())["num_steps"] == 12


def test_evaluate_prints_what_it_writes(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of figures that were measured once, by the demo."""
    figures = json.loads((out / "evaluation.json").read_text())
    found = SimpleNamespace(figures=figures)
    monkeypatch.setattr("m3i_fast.engine.evaluator.evaluate", lambda *_, **__: found)
    assert main(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["evaluate", str(out)]) == 0
    shown, messages = capsys.readouterr()
    assert str(out / "evaluation.json") in messages
    for title, name in (
        ("Category by kNN", "knn_top1"),
        ("Category by kNN, hard half", "knn_top1_hard"),
    ):
        (cells,) = re.findall(f"^ *{title}  (.*)$", shown, re.M)
        values = [f"{100 * figures[name][who]:.1f}%" for who in SOURCES]
        assert cells.replace("*", "").split() == values
        intervals = figures["trained_minus"][name]
        told = [intervals[who]["p_value"] < 0.05 for who in SOURCES if who != "trained"]
        assert cells.count("*") == told.count(False)


def test_an_older_run_is_set_aside(out: Path) -> None:
    others = [path.name for path in out.parent.iterdir() if path.name.startswith("run-")]
    assert len(others) == 1 and re.fullmatch(r"run-\d{8}-\d{6}", others[0])
    assert (out.parent / others[0] / "report.html").exists()


@pytest.mark.pages
def test_the_page_opens_without_a_complaint(out: Path, tmp_path: Path) -> None:
    if reason := skip_reason():
        pytest.skip(reason)
    page = out / "report.html"
    embedded = re.search(r'<script[^>]*id="figures"[^>]*>(.*?)</script>', page.read_text(), re.S)
    assert embedded is not None
    check_page(page, tmp_path, num_figures=len(json.loads(embedded[1])))


def test_a_run_that_is_going_on_is_not_set_aside(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    with pytest.raises(FileExistsError, match="is training in it"):
        set_aside(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    lock.release()
    set_aside(tmp_path / "run")
    assert [path.name[:4] for path in tmp_path.iterdir()] == ["run-"]
