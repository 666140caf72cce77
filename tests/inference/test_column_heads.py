"""Heads of named columns answer for pictures: classes, labels, and numbers in the data's units."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import m3i_fast
from m3i_fast.cli import main
from tests.inference.column_run import COLUMNS, answers, colours, picture, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("columns"))


@pytest.fixture(scope="module")
def model(run: Path) -> m3i_fast.Model:
    return m3i_fast.load(run, device="cpu")


def test_what_was_learnt_is_answered_in_the_order_and_units_of_the_data(
    model: m3i_fast.Model,
) -> None:
    shown = colours(60)[30:]
    pictures = [Image.fromarray(picture(colour)) for colour in shown]
    expected = [answers(colour) for colour in shown]
    assert model.column_names == {column.name: column.names for column in COLUMNS}

    paint = model.classify(pictures, "paint")
    assert paint.argmax(1).tolist() == [each["paint"] for each in expected]
    tones = model.classify(pictures, "tones") > 0
    hot = torch.zeros_like(tones)
    for row, each in zip(hot, expected, strict=True):
        row[each["tones"]] = True
    assert (tones == hot).float().mean(0).min() > 0.9
    assert not tones[:, 0].any()  # no picture is grey
    light = model.predict_numbers(pictures, "light").numpy()
    known = np.array([each["light"] for each in expected])
    left = ((light - known) ** 2).mean(0) / known.var(0)
    assert left.max() < 0.2, left


def test_a_folder_of_weights_has_the_heads(
    run: Path, model: m3i_fast.Model, tmp_path: Path
) -> None:
    assert main(["export", str(run), str(tmp_path / "small"), "--to", "safetensors"]) == 0
    again = m3i_fast.load(tmp_path / "small", device="cpu")
    views = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert again.column_names == model.column_names
    for column in ("paint", "tones"):
        assert torch.equal(again.classify(views, column), model.classify(views, column))
    numbers = model.predict_numbers(views, "light")
    assert torch.equal(again.predict_numbers(views, "light"), numbers)


def test_a_graph_has_the_answers_of_every_column(
    run: Path, model: m3i_fast.Model, tmp_path: Path
) -> None:
    assert main(["export", str(run), str(tmp_path / "graph"), "--to", "onnx"]) == 0
    session = onnxruntime.InferenceSession(
        tmp_path / "graph" / "image.onnx", providers=["CPUExecutionProvider"]
    )
    views = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    names = [output.name for output in session.get_outputs()]
    got = dict(zip(names, session.run(names, {"pixels": views.numpy()}), strict=True))
    expected = {
        "logits_paint": model.classify(views, "paint"),
        "logits_tones": model.classify(views, "tones"),
        "numbers_light": model.predict_numbers(views, "light"),
    }
    assert names == ["tokens", "pooled", *expected]
    for name, value in expected.items():
        torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=1e-4, atol=1e-4)
    told = json.loads((tmp_path / "graph" / "preprocess.json").read_text())["columns"]
    assert {name: tuple(of["names"]) for name, of in told.items()} == model.column_names
    assert [of["output"] for of in told.values()] == list(expected)
    assert [of["activation"] for of in told.values()] == ["softmax", "sigmoid", None]


@pytest.mark.parametrize(
    ("call", "column", "said"),
    [
        ("classify", "", r"expected a category head, got heads of the columns paint, tones, light"),
        ("classify", "hue", r"column: expected a head of 'hue', got heads of the columns paint, "),
        ("classify", "light", r"got 'light', whose numbers predict_numbers\(pictures, column\)"),
        ("predict_numbers", "tones", r"got 'tones', whose logits classify\(pictures, column\)"),
    ],
)
def test_another_column_is_refused(
    model: m3i_fast.Model, call: str, column: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        getattr(model, call)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), column)


def test_a_record_without_the_columns_says_so(run: Path, tmp_path: Path) -> None:
    """As one of a version that kept none."""
    copy = shutil.copytree(run, tmp_path / "run")
    tree = json.loads((copy / "data.json").read_text())
    assert [column["name"] for column in tree.pop("columns")] == ["paint", "tones", "light"]
    (copy / "data.json").write_text(json.dumps(tree))
    old = m3i_fast.load(copy, device="cpu")
    with pytest.raises(
        ValueError, match="names of the columns light, paint, tones, got those of n"
    ):
        _ = old.column_names
