"""m3i-fast evaluate: which of its two protocols a request is for, and what is printed and kept."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from m3i_fast.cli import main
from m3i_fast.cli.evaluate import EvaluateCommand, OnPictures
from m3i_fast.config.fields import check_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.measuring.measures import MEASURES, chosen_measures
from tests.shared.engine.small_run import small_run
from tests.shared.masked_folder import masked_folder
from tests.shared.ranks import start_ranks


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "run"
    cfg = replace(small_run(dataset), num_steps=1, log_every=1, num_threads=1)
    Trainer(replace(cfg, checkpoint_every=1), out).train()
    return out


ALL = ["--measures", *MEASURES, "--linear-steps", "20", "--attentive-epochs", "1"]
ALL += ["--fine-tuning-epochs", "1", "--segmentation-steps", "2"]


def arguments(run: Path, dataset: Path, tmp_path: Path) -> list[str]:
    cache = ["--cache-dir", str(tmp_path / "cache"), "--workers", "0", "--device", "cpu"]
    return ["evaluate", str(run), "--data", str(dataset), *cache]


def test_a_run_is_measured_beside_what_it_started_from(
    run: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("M3I_RESULTS", str(tmp_path / "ledger"))
    beside = ["--baseline", "pixels", "--baseline", f"random:{run}", "--record"]
    assert main([*arguments(run, dataset, tmp_path), *beside]) == 0
    told = capsys.readouterr()
    said = " ".join(told.err.split())
    assert "pictures have no label" in said
    assert said.index("measured: knn, few-labels, zero-shot, retrieval") < said.index("wrote ")
    page = run / "evaluation" / "page.html"
    assert said.index("wrote ") < said.index(f"open {page}")
    html = page.read_text()
    for text in (f"Evaluation of {run.name} on {dataset.name}", f"Against random:{run.name}, of "):
        assert text in html, text
    for part in ("zero-shot-calibration", "knn-confusion", "Answered worst", "Patch features of "):
        assert part in html, part
    for text in ("kNN, k = 20", "picture to caption, recall at 10", "zero-shot, top 1", "1%"):
        assert text in told.out, text
    stored = json.loads((run / "evaluation" / "results.json").read_text())
    assert [encoder["name"] for encoder in stored["encoders"]] == [
        str(run),
        "pixels",
        f"random:{run}",
    ]
    assert set(stored["encoders"][0]["measures"]) == set(chosen_measures(()))
    assert set(stored["encoders"][1]["measures"]) == {"knn", "few-labels"}
    assert {"knn: k = 20", "retrieval: caption to picture, recall at 5"} <= set(
        stored["comparisons"][f"random:{run}"]
    )
    (row,) = (tmp_path / "ledger" / "evaluation.jsonl").read_text().splitlines()
    figures = json.loads(row)["figures"]
    assert figures["encoders"][0]["knn"] == stored["encoders"][0]["measures"]["knn"]["figures"]
    assert str(tmp_path) not in json.dumps(figures["data"])


def test_measures_that_take_long_are_told_and_stand_in_the_table(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*ALL, "--baseline", "pixels", "--out", str(tmp_path / "out")]
    words += ["--segmentation", str(masked_folder(tmp_path / "masks"))]
    assert main([*arguments(run, dataset, tmp_path), *words]) == 0
    told = capsys.readouterr()
    said = " ".join(told.err.split())
    for text in (
        f"{run}: linear: about 20 steps of 1,024 rows (--linear-steps)",
        f"{run}: attentive: epochs: 1 (--attentive-epochs)",
        f"{run}: fine-tuning: epochs: 1 (--fine-tuning-epochs)",
        f"{run}: correspondence: two crops",
        f"{tmp_path / 'masks'}: 2 steps of 16 crops (--segmentation-steps)",
    ):
        assert text in said, text
    for text in ("linear, top 1", "attentive, top 1", "fine-tuning, top 1", "patches found"):
        assert text in told.out, text
    html = (tmp_path / "out" / "page.html").read_text()
    for measure in ("linear", "attentive", "fine-tuning"):
        assert f'id="evaluation-{measure}-confusion"' in html
        assert f'id="evaluation-{measure}-calibration"' in html
    assert "segmentation, mean IoU" in html and "correspondence, patches found" in html
    assert "segmentation, mean IoU" in told.out
    assert "pixels: not measured: fine-tuning: pixels cannot be fine-tuned" in told.out
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    ours, pixels = (encoder["measures"] for encoder in stored["encoders"])
    assert set(ours) == set(MEASURES) and set(pixels) == {"knn", "few-labels", "linear"}
    assert stored["settings"]["training"]["linear_steps"] == 20
    assert "linear: top 1" in stored["comparisons"]["pixels"]


def test_json_has_the_figures_of_the_file(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--json", "--measures", "retrieval"]
    assert main([*arguments(run, dataset, tmp_path), *out]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(printed["encoders"][0]["measures"]) == {"retrieval"}


def test_without_plotly_figures_are_kept_and_the_page_is_told_to_lack(
    run: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "page.html").write_text("of an earlier evaluation")
    earlier = {"settings": {"model": str(run)}, "data": {"path": dataset.name}}
    (out / "results.json").write_text(json.dumps(earlier))
    words = ["--out", str(out), "--measures", "knn"]
    assert main([*arguments(run, dataset, tmp_path), *words]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "no page: the report needs plotly: pip install 'm3i-fast[eval]'" in said
    assert (out / "results.json").is_file() and not (out / "page.html").exists()


def test_flags_of_pictures_need_pictures(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["evaluate", *words]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "--data: expected the folder of pictures" in refused(str(run), "--baseline", "pixels")
    both = ["--data", str(dataset), "--held-out-data", str(dataset)]
    assert "--held-out-data: expected without --data" in refused(str(run), *both)
    empty = tmp_path / "names.txt"
    empty.write_text("cat\n\n")
    names = ["--data", str(dataset), "--class-names", str(empty)]
    assert "--class-names: expected text on each line" in refused(str(run), *names)
    share = ["--data", str(dataset), "--share", "1"]
    assert "--share: expected a number in (0, 1), got 1.0" in refused(str(run), *share)


def test_help_names_every_measure_and_both_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (*MEASURES, "--held-out-data", "Without --data, MODEL is a run", "timm:"):
        assert text in said, text
    check_fields(EvaluateCommand(model="run", pictures=OnPictures()))


def evaluate(rank: int, num_ranks: int, port: int, words: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert main(words) == 0


@pytest.mark.matrix
def test_two_ranks_have_the_results_of_one(run: Path, dataset: Path, tmp_path: Path) -> None:
    found, masks = [], ["--segmentation", str(masked_folder(tmp_path / "masks"))]
    for num_ranks in (1, 2):
        here = tmp_path / str(num_ranks)
        words = [*arguments(run, dataset, here), "--out", str(here / "out"), *ALL, *masks]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        start_ranks(evaluate, (num_ranks, port, words), num_ranks)
        found.append(here)
    one, two = found
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
    assert len(files) > 40
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
