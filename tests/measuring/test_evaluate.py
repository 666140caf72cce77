"""What can be measured is told first, and figures of pictures equal the libraries'."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

from m3i_fast.cli.evaluate import MeasureName
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.evaluation.rows.few_labels import distinct_shares
from m3i_fast.evaluation.statistics import hits_interval
from m3i_fast.measuring.evaluate import (
    EvaluationSettings,
    default_out,
    evaluate,
    missing_classes,
    plan,
)
from m3i_fast.measuring.features import ExtractionSettings
from m3i_fast.measuring.measure import Figure, Measured
from m3i_fast.measuring.measures import MEASURES, _classifying_feature
from m3i_fast.measuring.results import Results, expect_kept, expect_replaceable, slug
from m3i_fast.measuring.source import SourceSettings
from m3i_fast.measuring.tables import print_results
from tests.measuring.pictures import COLOURS, clip_folder, image_folder, picture

ONE = World(torch.device("cpu"))


def settings_of(
    data: Path, tmp_path: Path, model: str = "pixels", **more: Any
) -> EvaluationSettings:
    split = more.pop("split", None)
    cache = tmp_path / "cache"
    return EvaluationSettings(
        model=model,
        source=SourceSettings(path=data, split=split, cache_dir=cache),
        extraction=ExtractionSettings(cache_dir=cache, batch_size=8),
        dtype=torch.float32,
        **more,
    )


def measured(settings: EvaluationSettings) -> Results:
    results = evaluate(settings, plan(settings), ONE)
    assert results is not None
    return results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data", each=8)


def test_zero_shot_of_an_image_folder_is_open_clips(folder: Path, tmp_path: Path) -> None:
    clip = clip_folder(tmp_path / "clip")
    settings = settings_of(folder, tmp_path, f"open_clip:{clip}", measures=("zero-shot", "knn"))
    results = measured(settings)
    name = f"local-dir:{clip}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    weight = open_clip.build_zero_shot_classifier(
        model.eval(),
        open_clip.get_tokenizer(name),
        [*COLOURS],
        open_clip.OPENAI_IMAGENET_TEMPLATES,
    )
    files = sorted((folder / "val").rglob("*.png"))
    pictures = torch.stack([transform(Image.open(file)) for file in files])
    label = torch.tensor([[*COLOURS].index(file.parent.name) for file in files])
    with torch.no_grad():
        logits = 100 * normalize(model.encode_image(pictures), dim=-1) @ weight
    figures = results.encoders[0].figures()
    expected = float((logits.argmax(1) == label).double().mean())
    assert figures["zero-shot", "top 1"].value == pytest.approx(expected)
    assert ("zero-shot", "top 5") not in figures  # of three classes
    assert results.encoders[0].measured["zero-shot"].settings["templates"] == 80


def test_knn_of_pixels_is_scikit_learns(folder: Path, tmp_path: Path) -> None:
    results = measured(settings_of(folder, tmp_path))
    figures = results.encoders[0].figures()

    def pixels(split: str) -> tuple[np.ndarray, list[str]]:
        files = sorted((folder / split).rglob("*.png"))
        squares = []
        for file in files:
            opened = Image.open(file).crop((4, 0, 44, 40)).resize((12, 12), Image.Resampling.BOX)
            squares.append(np.asarray(opened).transpose(2, 0, 1).reshape(-1) / 255)
        return np.stack(squares), [file.parent.name for file in files]

    for k in (10, 20):
        classifier = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        )
        classifier.fit(*pixels("train"))
        expected = classifier.score(*pixels("val"))
        assert figures["knn", f"k = {k}"].value == pytest.approx(expected)
        assert 0.4 < expected <= 1
    assert ("knn", "k = 100") not in figures  # the bank has 24 rows
    assert set(results.encoders[0].left_out) == {"zero-shot", "retrieval"}
    assert "pixels has no text tower" in results.encoders[0].left_out["zero-shot"]


def test_baselines_stand_beside_with_paired_intervals(folder: Path, tmp_path: Path) -> None:
    clip = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    results = measured(settings_of(folder, tmp_path, clip, baselines=("pixels",)))
    ours, theirs = (encoder.figures() for encoder in results.encoders)
    intervals = results.comparisons()["pixels"]
    assert ("zero-shot", "top 1") in ours and ("zero-shot", "top 1") not in intervals
    key = ("knn", "k = 20")
    expected = hits_interval(
        ours[key].hits, theirs[key].hits, results.source.measured.group[ours[key].rows]
    )
    assert intervals[key].difference == pytest.approx(expected.difference)
    assert intervals[key].low == expected.low
    assert intervals[key].p_value >= expected.p_value  # by Holm's correction
    results.save(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["comparisons"]["pixels"]["knn: k = 20"]["low"] == expected.low
    predicted = np.load(tmp_path / "out" / "1_pixels" / "knn.predicted.npy")
    assert predicted.shape == (2, 24)
    names = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert (len(names["names"]), names["classes"]) == (24, [*COLOURS])


def test_a_measured_picture_that_is_also_fitted_to_is_told(folder: Path, tmp_path: Path) -> None:
    copy = folder / "val" / "red" / "copy.png"
    copy.write_bytes((folder / "train" / "red" / "3.png").read_bytes())
    results = measured(settings_of(folder, tmp_path))
    assert results.shared_pictures == [("val/red/copy.png", "train/red/3.png")]
    assert results.as_dict()["pictures_also_in_train"] == [["val/red/copy.png", "train/red/3.png"]]


def test_classes_that_are_not_in_both_splits_are_told(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "violet").mkdir()
    picture((120, 0, 200), 99).save(folder / "val" / "violet" / "0.png")
    settings = settings_of(folder, tmp_path)
    planned = plan(settings)
    assert missing_classes(planned.source) == (["violet"], 1)
    results = evaluate(settings, planned, ONE)
    assert results is not None
    by_class = results.encoders[0].measured["knn"].details["by_class, k = 20"]
    assert by_class["violet"] == 0


def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for i in range(3):
        picture((0, 0, 0), i).save(bare / f"{i}.png")
    with pytest.raises(ValueError, match="nothing to measure: knn: no labels in train"):
        plan(settings_of(bare, tmp_path, "runs/absent"))
    one = tmp_path / "one"
    for split in ("train", "val"):
        (one / split / "cat").mkdir(parents=True)
        picture((0, 0, 0), 5).save(one / split / "cat" / "0.png")
    with pytest.raises(ValueError, match="knn: one class alone"):
        plan(settings_of(one, tmp_path))
    folder = image_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="--measures retrieval: 0 captioned pictures in heldout"):
        plan(settings_of(folder, tmp_path, measures=("retrieval",)))
    with pytest.raises(ValueError, match="--measures: expected some of knn, few-labels"):
        settings_of(folder, tmp_path, measures=("kNN",))
    with pytest.raises(ValueError, match=r"--templates: expected \{\} in each line"):
        settings_of(folder, tmp_path, templates=("a photo",))
    asked = settings_of(folder, tmp_path, measures=("zero-shot",))
    with pytest.raises(ValueError, match="zero-shot: pixels has no text tower"):
        evaluate(asked, plan(asked), ONE)


def test_results_never_go_into_a_checkpoint(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    assert default_out(str(tmp_path / "run")) == tmp_path / "run" / "evaluation"
    assert default_out(str(step)) == tmp_path / "run" / "evaluation_step_00000004"
    assert default_out("timm:test_vit") == Path("evaluation/timm_test_vit")
    assert default_out(f"{tmp_path / 'run'},which=ema") == tmp_path / "run" / "evaluation"


def test_a_row_of_the_table_says_whose_protocol_it_is() -> None:
    for name, row in MEASURES.items():
        assert "arXiv" in row.paper and row.protocol and row.title, name


def test_results_take_the_place_of_earlier_ones(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clip = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    measured(settings_of(folder, tmp_path, baselines=(clip,), measures=("knn",))).save(out)
    (out / "2_notes").mkdir()
    (out / "2_notes" / "mine.txt").touch()
    measured(settings_of(folder, tmp_path, measures=("knn",))).save(out)
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == ["0_pixels", "2_notes"]
    assert slug("random:runs/demo") != slug("runs/demo") == "runs_demo"


def test_figures_are_kept_as_they_are_measured(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clip = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    settings = settings_of(folder, tmp_path, baselines=(clip,), measures=("knn", "few-labels"))
    measured(settings).save(out)
    before = (out / "results.json").read_bytes()
    told: list[str] = []

    def cut_off(so_far: Results) -> None:
        so_far.keep(out)
        if len(so_far.encoders) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(settings, plan(settings), ONE, tell=told.append, keep=cut_off)
    ours, theirs = json.loads((out / "unfinished.json").read_bytes())["encoders"]
    assert ([*ours["measures"]], [*theirs["measures"]]) == (["knn", "few-labels"], ["knn"])
    earlier = json.loads(before)["encoders"]
    assert ours == earlier[0] and theirs["measures"]["knn"] == earlier[1]["measures"]["knn"]
    assert (out / "results.json").read_bytes() == before
    k, figure = next(iter(ours["measures"]["knn"]["figures"].items()))
    assert told[0].startswith(f"pixels: kNN: {k} {100 * figure:.1f}")
    measured(settings).save(out)
    assert not (out / "unfinished.json").exists()


def test_no_other_results_are_removed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = settings_of(folder, tmp_path, measures=("knn",))
    expect_replaceable(out, model=asked.model, data=folder)
    measured(asked).save(out)
    expect_replaceable(out, model=asked.model, data=folder)
    for again in (f"{asked.model}/", f"./{asked.model}", str(Path(asked.model).absolute())):
        expect_replaceable(out, model=again, data=folder)
    for model, data in ((asked.model, tmp_path / "flowers"), ("timm:other", folder)):
        with pytest.raises(ValueError, match=f"--out: .*results of {model} on {data.name}, got"):
            expect_replaceable(out, model=model, data=data)
    for name, content in (("results.json", "[]"), ("page.html", "<p>")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"--out: expected .* {name} of others, got"):
            expect_replaceable(tmp_path, model=asked.model, data=folder)
        (tmp_path / name).unlink()


def test_figures_that_are_not_measured_again_are_not_removed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = settings_of(folder, tmp_path, measures=("knn", "few-labels"))
    first = plan(asked)
    expect_kept(out, source=first.source, encoders=("pixels",), measures=first.measures)
    measured(asked).save(out)
    expect_kept(out, source=first.source, encoders=("pixels", "x"), measures=first.measures)
    with pytest.raises(ValueError, match="--out: .* holds few-labels of pixels, which these"):
        expect_kept(out, source=first.source, encoders=("pixels",), measures=("knn",))
    other = plan(settings_of(image_folder(tmp_path / "more" / "data", each=7), tmp_path))
    with pytest.raises(ValueError, match="results of these pictures, got .* those of others"):
        expect_kept(out, source=other.source, encoders=("pixels",), measures=first.measures)


@pytest.mark.parametrize(
    ("reads", "names", "expected"),
    [
        (True, ("class_1", "mean_1", "image"), "class_1"),
        (False, ("class_1", "mean_1", "image"), "mean_1"),
        (True, ("mean_1", "image"), "mean_1"),
        (False, ("class_1",), "class_1"),
        (True, ("image",), "image"),
    ],
)
def test_the_class_token_classifies_where_training_read_it(
    reads: bool, names: tuple[str, ...], expected: str
) -> None:
    encoder, rows = SimpleNamespace(reads_class_token=reads), SimpleNamespace(names=names)
    inputs: Any = SimpleNamespace(encoder=encoder, measured=rows)
    assert _classifying_feature(inputs) == expected


def test_rows_that_differ_are_paired_by_row_or_told(folder: Path, tmp_path: Path) -> None:
    clip = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    results = measured(settings_of(folder, tmp_path, clip, baselines=("pixels",)))
    key, theirs = ("knn", "k = 20"), results.encoders[1].measured["knn"]
    (figure,) = (one for one in theirs.figures if one.name == key[1])
    assert figure.hits is not None and figure.rows is not None
    kept = np.arange(3, len(figure.rows))
    fewer = replace(figure, hits=figure.hits[kept], rows=figure.rows[kept])
    found = _with(results, theirs, fewer).comparisons()["pixels"][key]
    ours = results.encoders[0].figures()[key]
    assert ours.hits is not None and fewer.hits is not None
    group = results.source.measured.group[fewer.rows]
    expected = hits_interval(ours.hits[kept], fewer.hits, group)
    assert (found.difference, found.low) == (expected.difference, expected.low)
    twice = replace(figure, rows=np.zeros_like(figure.rows))  # as captions of one picture
    other = _with(results, theirs, twice)
    assert key not in other.comparisons()["pixels"]
    console = Console(record=True, width=200)
    print_results(other, console)
    said = console.export_text()
    (line,) = (line for line in said.splitlines() if "kNN, k = 20" in line)
    assert line.rstrip().endswith("?") and "? not compared" in said


def _with(results: Results, theirs: Measured, figure: Figure) -> Results:
    """Results with another figure of the baseline's kNN in place of those that it has."""
    ours, other = results.encoders
    measured = {"knn": replace(theirs, figures=(figure,))}
    return replace(results, encoders=[ours, replace(other, measured=measured)])


def test_captioned_pictures_that_are_all_broken_leave_retrieval_out(
    tmp_path: Path,
) -> None:
    rows = ["file,caption,label,split"]
    for i in range(12):
        file = tmp_path / f"{i}.png"
        picture((20 * i, 0, 100), i).save(file)
        has_caption = i >= 8
        if has_caption:
            file.write_bytes(file.read_bytes()[:90])
        caption = f"picture {i}" if has_caption else ""
        rows.append(f"{i}.png,{caption},{'ab'[i % 2]},{'train' if i < 4 else 'test'}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    clip = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    results = measured(settings_of(tmp_path / "table.csv", tmp_path, clip, baselines=("pixels",)))
    for encoder in results.encoders:
        assert "knn" in encoder.measured
    assert results.encoders[0].left_out == {
        "retrieval": "0 captioned pictures in test, of pictures that can be decoded"
    }
    asked = settings_of(tmp_path / "table.csv", tmp_path, clip, measures=("retrieval",))
    with pytest.raises(ValueError, match="cannot be measured as asked: retrieval: 0 captioned"):
        measured(asked)


def test_a_share_that_draws_what_a_larger_one_draws_is_left_out(
    folder: Path, tmp_path: Path
) -> None:
    results = measured(settings_of(folder, tmp_path, measures=("few-labels",)))
    figures = results.encoders[0].figures()
    assert {name for _, name in figures} == {"10%", "10%, calibration error"}
    assert distinct_shares(np.repeat([0, 1], [8, 30])) == (0.01, 0.1)


def test_a_measure_that_is_not_there_is_told_without_torch() -> None:
    assert set(get_args(MeasureName)) == set(MEASURES)
    code = (
        "import sys; from m3i_fast.cli.evaluate import main\n"
        "try: main(['pixels', '--data', 'x', '--measures', 'kNN'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "few-labels" in done.stdout + done.stderr
