"""m3i-fast report as a person types it, for runs of every kind, and the pages in a browser."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.cli import main
from m3i_fast.cli.report import nearest_recipe
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.engine.evaluator import load_objective
from m3i_fast.engine.run.lock import RunLock
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.recipes import recipes, shrink
from m3i_fast.report.run import gather
from tests.shared.chromium import check_page, skip_reason
from tests.shared.groups import in_matrix

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
OTHERS = [
    "demo_mae",
    "demo_clip",
    *(in_matrix(name) for name in ("demo_supervised", "demo_internimage")),
]


def config(name: str, data: Path, **changes: object) -> TrainConfig:
    cfg = shrink(recipes()[name](), path=data, num_classes=9, text=TEXT)
    cfg = replace(cfg, data=replace(cfg.data, batch_size=8), num_steps=4, checkpoint_every=4)
    return replace(cfg, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of the demo's recipe with evaluations, whose data are its own copy."""
    place = tmp_path_factory.mktemp("report")
    shutil.copytree(dataset, place / "data")
    Trainer(config("demo", place / "data", evaluate_every=2), place / "run").train()
    return place / "run"


def report(run: Path, *flags: str) -> str:
    assert main(["report", str(run), *flags]) == 0
    return (run / "report.html").read_text()


def figures(html: str) -> dict[str, object]:
    found = re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    drawn: dict[str, object] = json.loads(found[1])
    return drawn


def copied(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / "run"))


def test_a_complete_run_has_every_part(run: Path, tmp_path: Path) -> None:
    run = copied(run, tmp_path)
    data = TrainConfig.load(run / "config.json").data.path
    on_pictures = ["--data", str(data), "--measures", "knn", "zero-shot", "retrieval"]
    cached = ["--cache-dir", str(tmp_path / "cache"), "--workers", "0"]
    assert main(["evaluate", str(run), *on_pictures, *cached]) == 0
    shutil.copytree(run / "evaluation", run / "evaluation_00000004")  # as of a checkpoint
    html = report(run)
    drawn = figures(html)
    assert "The run is complete, 4 steps." in html
    parts = "loss-total optim-grad_norm monitor-target_rank evaluate-knn_top1 throughput-img_s"
    parts += " time-shares found-within confusion calibration"
    parts += " data-evaluation-knn-confusion data-evaluation-zero-shot-calibration"
    parts += " data-evaluation_00000004-knn-confusion"
    assert set(parts.split()) <= drawn.keys()
    for text in (
        *("What M3I does", "What the model sees", "Blocks of cells of 2 pictures share"),
        *("Most similar pictures", "differ from recipe demo", "bounds the speed"),
        *("Patch features as colour", "2 evaluations took", "sha256 "),
        *("The live model at 2 steps from 2 to 4", "Evaluation of run on data"),
        *("Its own page is evaluation_00000004/page.html", "Captions and the pictures they find"),
    ):
        assert text in html
    assert html.count('class="answer') == 12 + 2 * 2 * 8 and len(html) < 10e6
    if skip_reason() is None:
        check_page(run / "report.html", tmp_path, num_figures=len(drawn))


@pytest.mark.parametrize(("most", "batch"), [(5, 3), (3, 3), (2, 64), (10**6, 7)])
def test_no_more_pictures_are_encoded_than_asked_for(
    most: int, batch: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = TrainConfig.load(run / "config.json")
    monkeypatch.setattr(gather, "_BATCH", batch)
    shown = gather.ShownEncoder(encoder=load_objective(run, cfg).encoder)
    manifest = read_manifest(cfg.data.path)
    held = gather._embed(cfg, cfg.data, "heldout", manifest, {"trained": shown}, most)
    number = min(most, manifest.splits["heldout"].num_groups)
    assert len(held.views) == len(held.captions) == len(held.label) == number
    assert len(held.features["trained"]) == number
    assert len(held.tokens["trained"]) == min(number, gather.NUM_PCA)
    size = cfg.vision.image_size
    whole = evaluation_batches(
        cfg.data.path, "heldout", image_size=size, batch_size=64, representatives_only=True
    )
    views = torch.cat([of.global_views[0] for of in whole])
    assert torch.equal(held.views[[0, -1]], views[[0, -1]])  # they are from all over the split


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_and_encoders_leave_out_what_they_lack(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    cfg = config(name, dataset, num_steps=2, checkpoint_every=2)
    if name == "demo_supervised":
        mixing = replace(cfg.objective.mixing, mode="blend")
        cfg = replace(cfg, objective=replace(cfg.objective, mixing=mixing))
    Trainer(cfg, tmp_path / "run").train()
    html = report(tmp_path / "run")
    told = {
        "demo_mae": "75% of the cells are hidden",
        "demo_clip": "The encoder reads whole views.",
        "demo_supervised": "Each pixel is a weighted mean of two pictures",
        "demo_internimage": "its tokens attend to everything",
    }
    assert told[name] in html
    assert ("What M3I does" in html) == (name == "demo_internimage")
    learns_captions = name in ("demo_clip", "demo_internimage")
    assert ("found-within" in figures(html)) == learns_captions
    assert ("The run learns no captions." in html) == (not learns_captions)
    assert ("confusion" in figures(html)) == (name in ("demo_supervised", "demo_internimage"))
    assert "Most similar pictures" in html and "Patch features as colour" in html
    if skip_reason() is None and name == "demo_mae":
        check_page(tmp_path / "run" / "report.html", tmp_path, num_figures=len(figures(html)))


def test_a_run_whose_data_are_gone_says_so_and_finds_them_by_a_flag(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    moved = copied(run, tmp_path)
    cfg = TrainConfig.load(moved / "config.json")
    replace(cfg, data=replace(cfg.data, path=tmp_path / "gone")).save(moved / "config.json")
    html = report(moved)
    assert html.count("The run&#39;s data are not there: ") == 4 and "--data DIR" in html
    assert "loss-total" in figures(html) and "confusion" not in figures(html)
    html = report(moved, "--data", str(dataset))
    assert "data are not there" not in html and "confusion" in figures(html)


def test_a_run_that_broke_off_before_its_first_row_has_a_page(run: Path, tmp_path: Path) -> None:
    broken = copied(run, tmp_path)
    shutil.rmtree(broken / "checkpoints")
    (broken / "metrics.jsonl").unlink()
    (broken / "stacks-rank0.txt").write_text("stack")
    html = report(broken)
    assert "The run ended before its end, at step 0 of 4" in html and "stacks-rank0.txt" in html
    assert html.count("No checkpoint can be shown: ") == 3 and "No step was logged." in html
    assert "What the model sees" in html and figures(html) == {}


def test_a_run_that_goes_on_is_told_and_left_alone(run: Path, tmp_path: Path) -> None:
    live = copied(run, tmp_path)
    shutil.rmtree(live / "checkpoints")
    text = (live / "metrics.jsonl").read_text()
    (live / "metrics.jsonl").write_text(text + '{"step": 5, "loss/to')  # a row half written
    lock = RunLock(live)
    lock.acquire()
    (live / "report.html").unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in live.rglob("*") if path.is_file()}
    html = report(live)
    lock.release()
    assert "The run is training now, at step 4 of 4; newest is no checkpoint" in html
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_that_is_damaged_is_told(run: Path, tmp_path: Path) -> None:
    damaged = copied(run, tmp_path)
    for file in (damaged / "checkpoints").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    html = report(damaged)
    assert "No checkpoint can be shown: no good checkpoint in" in html
    assert "loss-total" in figures(html)


def test_the_page_goes_where_it_is_asked_and_watching_ends_with_the_run(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out), "--watch", "1000"]) == 0
    assert "<!doctype html>" in out.read_text()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"no run in {tmp_path}: expected" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_refused_before_a_picture_is_encoded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("m3i_fast.cli.report.write", lambda *_: pytest.fail("it began"))
    (tmp_path / "file").touch()
    for out, expected in (
        (tmp_path, "a file, got the folder"),
        (tmp_path / "file" / "x", "a folder"),
    ):
        assert main(["report", str(run), "--out", str(out)]) == 2
        assert f"--out: expected {expected}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["demo", "demo_clip", "m3i_vit_b_h100", "m3i_internimage_t"])
def test_the_nearest_recipe_is_found_with_what_differs(name: str) -> None:
    cfg = recipes()[name]()
    assert nearest_recipe(cfg)[1] == []
    changed = replace(cfg, seed=3, optim=replace(cfg.optim, lr=0.5))
    found, fields = nearest_recipe(changed)
    assert found == name
    assert fields == [("seed", cfg.seed, 3), ("optim.lr", cfg.optim.lr, 0.5)]
