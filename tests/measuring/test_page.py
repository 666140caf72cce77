"""The page of a real evaluation: what it draws is what libraries count, and how it reads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from sklearn import metrics
from sklearn.calibration import calibration_curve
from sklearn.decomposition import PCA
from torchvision.transforms import Normalize

from m3i_fast.engine.parallel.ranks import World
from m3i_fast.measuring.evaluate import EvaluationSettings, evaluate, plan
from m3i_fast.measuring.features import ExtractionSettings
from m3i_fast.measuring.measures import MEASURES
from m3i_fast.measuring.results import Results
from m3i_fast.measuring.source import SourceSettings
from m3i_fast.report.evaluations.class_figures import predictions
from m3i_fast.report.evaluations.examples import short_names
from m3i_fast.report.evaluations.files import evaluations_of, read_evaluation
from m3i_fast.report.evaluations.page import HEADLINES, parts, render_evaluation_page
from m3i_fast.report.inputs import DataEvaluation
from tests.measuring.pictures import COLOURS, TIMM, clip_folder, picture, timm_file
from tests.shared.chromium import check_page, skip_reason

EACH = 12  # pictures of a class and a split
HOSTILE = "<img src=x onerror=alert(1)> \u202e"


def captioned(root: Path) -> Path:
    """A table of pictures with two captions, a class and a split."""
    (root / "pictures").mkdir(parents=True)
    rows, seed = ["image,caption,label,split"], 0
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            for i in range(EACH):
                file = f"pictures/{split}_{name}_{i}.png"
                picture(colour, seed := seed + 1).save(root / file)
                said = f"{HOSTILE} {i}"
                rows += [f"{file},a {name} picture {said},{name},{split}"]
                rows += [f"{file},{i} in {name} {HOSTILE},{name},{split}"]
    (root / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root / "table.csv"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path, Path]:
    """Results of three encoders, the folder that they are saved in, and that of their files."""
    root = tmp_path_factory.mktemp("page")
    table = captioned(root / "data")
    clip, file = clip_folder(root / "clip"), timm_file(root)
    settings = EvaluationSettings(
        model=f"open_clip:{clip}",
        baselines=(f"timm:{TIMM},checkpoint={file}", "pixels"),
        source=SourceSettings(
            path=table, split_column="split", label_column="label", cache_dir=root / "cache"
        ),
        extraction=ExtractionSettings(cache_dir=root / "cache", batch_size=8),
        templates=("a {} picture",),
        dtype=torch.float32,
    )
    results = evaluate(settings, plan(settings), World(torch.device("cpu")))
    assert results is not None
    results.save(root / "run" / "evaluation")
    return results, root / "run" / "evaluation", root


@pytest.fixture(scope="module")
def evaluation(measured: tuple[Results, Path, Path]) -> DataEvaluation:
    return read_evaluation(measured[1])


def drawn(html: str) -> dict[str, Any]:
    found = re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    return figures


# ---- What is drawn -------------------------------------------------------------------------------


def test_class_figures_are_scikit_learns(
    measured: tuple[Results, Path, Path], evaluation: DataEvaluation
) -> None:
    results, folder, _ = measured
    figures = drawn(render_evaluation_page(evaluation))
    assert set(figures) == {
        "evaluation-knn-confusion",
        "evaluation-few-labels-confusion",
        "evaluation-few-labels-calibration",
        "evaluation-zero-shot-confusion",
        "evaluation-zero-shot-calibration",
    }
    label = results.source.measured.label
    arrays = results.encoders[0].measured["zero-shot"].arrays
    assert label.tolist() == [i for i in range(3) for _ in range(EACH)]
    (heat,) = figures["evaluation-zero-shot-confusion"]["data"]
    expected = metrics.confusion_matrix(label, arrays["predicted"])
    assert heat["customdata"] == expected.tolist() and heat["y"] == [*COLOURS]
    bars = figures["evaluation-zero-shot-calibration"]["data"][0]
    hit = arrays["predicted"] == label
    share, mean = calibration_curve(hit, arrays["confidence"], n_bins=15)
    np.testing.assert_allclose(bars["y"], share, rtol=1e-5)
    np.testing.assert_allclose([row[1] for row in bars["customdata"]], mean, rtol=1e-5)
    (heat,) = figures["evaluation-knn-confusion"]["data"]
    predicted = np.load(next(folder.glob("0_*/knn.predicted.npy")))
    ks = results.encoders[0].measured["knn"].settings["k"]
    expected = metrics.confusion_matrix(label, predicted[ks.index(20)])
    assert heat["customdata"] == expected.tolist()
    (heat,) = figures["evaluation-few-labels-confusion"]["data"]
    assert np.sum(heat["customdata"]) == 3 * len(label)  # three draws


def test_every_measure_that_predicts_classes_has_figures(evaluation: DataEvaluation) -> None:
    """Those of trained measures too, whose arrays are those of zero-shot."""
    first, *others = evaluation.results["encoders"]
    names = ("linear", "attentive", "fine-tuning")
    measures = first["measures"] | dict.fromkeys(names, first["measures"]["zero-shot"])
    arrays = dict(evaluation.arrays[0])
    assert measures["knn"]["settings"]["k"] == [10, 20]
    arrays["knn.predicted"] = np.stack([0 * evaluation.label, 0 * evaluation.label + 2])
    for name in names:
        for array in ("predicted", "confidence", "rows"):
            arrays[f"{name}.{array}"] = arrays[f"zero-shot.{array}"]
    more = replace(
        evaluation,
        results={**evaluation.results, "encoders": [first | {"measures": measures}, *others]},
        arrays=[arrays, *evaluation.arrays[1:]],
    )
    knn = next(iter(predictions(more)))
    assert knn.title == "kNN, k = 20" and set(knn.predicted) == {2}
    found = {each.measure: each.confidence is not None for each in predictions(more)}
    assert found == {"knn": False, "few-labels": True, "zero-shot": True} | dict.fromkeys(
        names, True
    )
    assert set(HEADLINES) == set(MEASURES)


def test_patches_are_the_principal_components_of_timms_tokens(
    measured: tuple[Results, Path, Path],
) -> None:
    results, _, root = measured
    found = results.encoders[1].patches
    items = results.source.measured.items
    files = [root / "data" / items[row].name for row in found["rows"]]
    model = timm.create_model(TIMM)
    model.load_state_dict(load_file(root / f"{TIMM}.safetensors"))
    pixels = timm.data.resolve_model_data_config(model)
    squares = [
        np.asarray(
            ImageOps.fit(Image.open(file), pixels["input_size"][1:], Image.Resampling.BICUBIC)
        )
        for file in files
    ]
    views = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        tokens = model.eval().forward_features(Normalize(pixels["mean"], pixels["std"])(views))
    tokens = tokens[:, model.num_prefix_tokens :].numpy()
    projected = PCA(3, svd_solver="full").fit_transform(tokens.reshape(-1, tokens.shape[-1]))
    colours = found["colours"].reshape(-1, 3).astype(np.float64)
    assert found["colours"].shape == (6, 10, 10, 3) and len({*found["rows"].tolist()}) == 6
    for component in range(3):
        inside = (colours[:, component] > 0) & (colours[:, component] < 255)
        shown = np.corrcoef(colours[inside, component], projected[inside, component])[0, 1]
        assert abs(shown) > 0.999
    assert not results.encoders[2].patches  # of pixels


def test_the_page_shows_the_pictures_of_its_rows(
    measured: tuple[Results, Path, Path], evaluation: DataEvaluation
) -> None:
    results, _, root = measured
    items = results.source.measured.items
    assert len(evaluation.pictures) > 10
    for row, shown in evaluation.pictures.items():
        opened = Image.open(root / "data" / items[row].name)
        expected = ImageOps.fit(opened, (96, 96), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(shown, np.asarray(expected))
        assert evaluation.picture_names[row] == items[row].captions[0]


def test_examples_have_their_right_ones_marked_and_ranked(evaluation: DataEvaluation) -> None:
    found = parts(evaluation, prefix="e")
    assert [side["title"].split()[0] for side in found.retrieval] == ["Captions", "Pictures"]
    for side, total in zip(found.retrieval, (3 * EACH, 6 * EACH), strict=True):
        best, worst = (group["cards"] for group in side["groups"])
        assert len(best) == len(worst) == 4
        assert max(card["rank"] for card in best) <= min(card["rank"] for card in worst)
        for card in best + worst:
            marks = [each["is_right"] for each in card["found"]]
            assert card["total"] == total and len(marks) == 5
            assert (card["rank"] <= 5) == any(marks)
            if any(marks):
                assert marks.index(True) == card["rank"] - 1


# ---- What is said --------------------------------------------------------------------------------


def test_the_table_has_every_figure_beside_its_interval_and_baselines(
    measured: tuple[Results, Path, Path], evaluation: DataEvaluation
) -> None:
    results, _, _ = measured
    found = parts(evaluation, prefix="e")
    rows = {row["title"]: row for group in found.table for row in group}
    assert len(rows) == len(results.encoders[0].figures())
    row = rows["kNN, k = 20"]
    figures = results.encoders[0].figures()
    stored = evaluation.results["encoders"][0]["measures"]["knn"]["intervals"]["k = 20"]
    assert row["value"] == f"{100 * figures['knn', 'k = 20'].value:.1f}%"
    assert row["interval"] == f"{100 * stored[0]:.1f}% to {100 * stored[1]:.1f}%"
    interval = results.comparisons()["pixels"]["knn", "k = 20"]
    cell = row["cells"][1]
    assert cell["verdict"] == interval.verdict.removesuffix(" found")
    assert cell["difference"].startswith(f"{100 * interval.difference:+.1f}".replace("-", "\u2212"))
    error = rows["zero-shot, calibration error"]
    assert error["interval"] == "" and error["cells"][1]["value"] == ""
    few = rows["few labels, 10%, calibration error"]
    assert few["cells"][1]["verdict"] == "not compared"


def test_the_page_says_what_was_measured_and_holds_no_markup_of_others(
    measured: tuple[Results, Path, Path], evaluation: DataEvaluation
) -> None:
    html = render_evaluation_page(evaluation)
    counts = evaluation.results["data"]["measured"]
    split, digest = counts["split"], counts["digest"]
    for text in (
        f"Measured on 36 pictures of split {split} of table.csv: 36 with one of 3 classes, 36 with "
        "a caption (72 captions).",
        "Classifiers are fitted to 36 pictures of split train.",
        f"Digest of what was measured: {digest[:16]}.",
        "Against pixels, of ",
        "pixels: not measured: zero-shot: pixels has no text tower",
        "DINO, arXiv 2104.14294",
        f"float32, sha256 {evaluation.results['encoders'][0]['digest']}",
    ):
        assert text in html, text
    assert "&lt;img src=x" in html  # as text, without what steers it
    assert "<img src=x" not in html and "\u202e" not in html
    assert "default-src 'none'" in html
    sources = re.findall(r'(?:src|href)="([^"]*)"', html.split('id="plotly"')[0])
    assert len(sources) > 50 and all(source.startswith("data:") for source in sources)


@pytest.mark.pages
@pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))
def test_the_page_reads_well_in_a_browser(evaluation: DataEvaluation, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_evaluation_page(evaluation), encoding="utf-8")
    check_page(page, tmp_path, num_figures=len(drawn(page.read_text())))


# ---- What is in a folder -------------------------------------------------------------------------


def test_an_evaluation_of_an_earlier_version_has_its_table(
    measured: tuple[Results, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results, _, _ = measured
    results.save(tmp_path / "evaluation")
    results.save(tmp_path / "evaluation_00000004")
    rows_file = tmp_path / "evaluation" / "rows.json"
    rows = json.loads(rows_file.read_text())
    for name in ("labels", "pictures", "captions"):
        del rows[name]
    rows_file.write_text(json.dumps(rows))
    (tmp_path / "evaluation" / "pictures.npy").unlink()
    for file in (tmp_path / "evaluation").glob("*/patches.*"):
        file.unlink()
    (tmp_path / "evaluation_broken").mkdir()
    (tmp_path / "evaluation_broken" / "results.json").write_text("{")
    older, newer = evaluations_of(tmp_path)
    assert (older.name, newer.name) == ("evaluation", "evaluation_00000004")
    html = render_evaluation_page(older)
    assert "kNN, k = 20" in html and drawn(html) == {}
    assert len(parts(newer, prefix="e").patches) == 6
    assert "the evaluation is left out" in caplog.text


def test_names_lose_their_folders_where_they_stay_different() -> None:
    def short(*names: str) -> list[str]:
        return short_names([{"name": name} for name in names])

    found = short("timm:vit,checkpoint=/a/b/c.safetensors", "/x/runs/one,which=ema", "runs/one")
    assert found == ["timm:vit,checkpoint=c.safetensors", "one,which=ema", "runs/one"]
    assert short("/a/run", "/b/run") == ["/a/run", "/b/run"]
    assert short("random:/a/run", "pixels") == ["random:run", "pixels"]


def test_what_a_baseline_alone_has_stands_in_the_table(
    measured: tuple[Results, Path, Path], tmp_path: Path
) -> None:
    results, _, _ = measured
    replace(results, encoders=results.encoders[::-1]).save(tmp_path)
    found = parts(read_evaluation(tmp_path), prefix="e")
    rows = {row["title"]: row for group in found.table for row in group}
    clip = results.encoders[0].figures()["zero-shot", "top 1"].value
    row = rows["zero-shot, top 1"]
    assert row["value"] == row["interval"] == row["cells"][1]["verdict"] == ""
    assert row["cells"][1]["value"] == f"{100 * clip:.1f}%"
    assert "zero-shot" in dict(found.protocols) and found.model == "pixels"
    assert not found.retrieval


def test_data_without_captions_and_an_encoder_without_patches_have_a_page(
    measured: tuple[Results, Path, Path], tmp_path: Path
) -> None:
    results, _, _ = measured
    alone = replace(
        results,
        encoders=results.encoders[2:],
        picture_rows=np.empty(0, np.int64),
        pictures=np.empty((0, 3, 1, 1), np.uint8),
    )
    alone.save(tmp_path)
    html = render_evaluation_page(read_evaluation(tmp_path))
    assert {name.split("-")[1] for name in drawn(html)} == {"knn", "few"}
    for absent in ("Captions and pictures", "Patch features", "Against"):
        assert absent not in html
