"""Heads of named columns answer for pictures: classes, labels, and numbers in the data's units."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config.models.text import TextConfig
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.dataset.columns import ColumnInfo
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.recipes import demo, shrink
from tests.shared.annotated import TERMS
from tests.shared.pipelines.data import encode_image, info, sample

COLUMNS = (
    ColumnInfo(name="paint", kind="class", names=("red", "green", "blue")),
    ColumnInfo(name="tones", kind="labels", names=("grey", "dark", "with_red"), size=3),
    ColumnInfo(name="light", kind="numbers", names=("percent", "kelvin"), size=2),
)


def colours(number: int) -> NDArray[np.uint8]:
    """[number, 3] colours, of which a third are most of red, of green, of blue."""
    rng = np.random.default_rng(0)
    found = rng.integers(0, 150, (number, 3))
    found[np.arange(number), np.arange(number) % 3] = rng.integers(180, 256, number)
    return found.astype(np.uint8)


def answers(colour: NDArray[np.uint8]) -> dict[str, Any]:
    """What columns say of a picture of one colour."""
    light = float(colour.mean() / 2.55)
    labels = [n for n, has in enumerate((False, light < 45, colour[0] > 100)) if has]
    return {"paint": int(colour.argmax()), "tones": labels, "light": [light, 6000 - 40 * light]}


def picture(colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.broadcast_to(colour, (32, 32, 3)).copy()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures of one colour each, until it tells them apart."""
    folder = tmp_path_factory.mktemp("columns")
    samples = [
        sample(i, encode_image(picture(colour)), captions=(), label=-1, columns=answers(colour))
        for i, colour in enumerate(colours(96))
    ]
    path = write_dataset(
        folder / "data", {"train": samples}, info(columns=COLUMNS), seed=0, samples_per_shard=96
    )
    text = TextConfig(vocab_size=9, context_length=9, dim=32, depth=1, num_heads=2, embed_dim=32)
    cfg = shrink(demo(), path=path, num_classes=3, text=text)
    names = {"genus": "paint", "tags": "tones", "sizes": "light"}
    terms = tuple(
        replace(TERMS[name], name=column, column=column) for name, column in names.items()
    )
    cfg = replace(
        cfg,
        objective=replace(cfg.objective, terms=terms),
        data=replace(
            cfg.data,
            batch_size=16,
            global_views=replace(cfg.data.global_views, jitter_probability=0.0),
            local_views=None,
        ),
        optim=replace(cfg.optim, lr=0.01),
        num_steps=150,
        checkpoint_every=150,
        num_threads=1,
    )
    Trainer(take_data_fields(cfg), folder / "run").train()
    return folder / "run"


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
