"""A head of classes or labels as a classifier that transformers loads, alone and in a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.engine.trainer import Trainer
from m3i_fast.recipes import demo_internimage, shrink
from tests.inference.column_run import colours, picture, trained
from tests.shared.engine.small_run import TEXT, small_run

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with heads of a class, of labels and of numbers."""
    return trained(tmp_path_factory.mktemp("columns"))


def export(run: Path, out: Path, *words: str) -> Path:
    command = ["export", str(run), str(out), "--to", "hf", "--task", "image-classification"]
    assert main([*command, *words]) == 0
    return out


def loaded(folder: Path) -> Any:
    model, said = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(said.values()), said
    assert type(model).__name__ == "M3IForImageClassification" and not model.training
    return model


@pytest.mark.parametrize("recipe", ["demo", "demo_internimage"])
def test_the_head_of_the_class_is_a_classifier(recipe: str, dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    cfg = small_run(dataset) if recipe == "demo" else cfg
    cfg = replace(cfg, num_steps=2, checkpoint_every=2, num_threads=1)
    Trainer(cfg, tmp_path / "run").train()
    theirs = loaded(export(tmp_path / "run", tmp_path / "out"))
    ours = m3i_fast.load(tmp_path / "run", device="cpu", dtype=torch.float32)
    assert tuple(theirs.config.id2label.values()) == ours.class_names
    pixels = torch.randn(3, 3, 32, 32)
    expected = ours.classify(pixels)
    assert expected.std() > 1e-2
    labels = torch.tensor([0, 3, 8])
    with torch.no_grad():
        got = theirs(pixels, labels=labels)
    torch.testing.assert_close(got.logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.loss, F.cross_entropy(expected, labels), rtol=0, atol=1e-4)
    encoder = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(encoder).__name__ == "M3IModel"
    with torch.no_grad():
        tokens = encoder(pixels).last_hidden_state
    torch.testing.assert_close(tokens, ours.forward_features(pixels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("column", ["paint", "tones"])
def test_a_pipeline_names_the_classes_or_labels_of_a_column(
    column: str, columns: Path, tmp_path: Path
) -> None:
    """As the model's own softmax of classes, or sigmoid of labels, says how probable they are."""
    out = export(columns, tmp_path / "out", "--column", column)
    ours = m3i_fast.load(columns, device="cpu", dtype=torch.float32)
    shown = Image.fromarray(picture(colours(4)[3]))
    logits = ours.classify(shown, column)[0]
    expected = logits.softmax(-1) if column == "paint" else logits.sigmoid()
    classify = transformers.pipeline("image-classification", model=str(out), trust_remote_code=True)
    scores = {row["label"]: row["score"] for row in classify(shown, top_k=None)}
    names = ours.column_names[column]
    assert scores.keys() == {*names}
    torch.testing.assert_close(
        torch.tensor([scores[name] for name in names]), expected, rtol=0, atol=1e-4
    )
    if column == "tones":
        hot = torch.tensor([[0, 1, 1]])
        with torch.no_grad():
            loss = loaded(out)(ours.transform(shown)[None], labels=hot).loss
        known = F.binary_cross_entropy_with_logits(logits[None], hot.float())
        torch.testing.assert_close(loss, known, rtol=0, atol=1e-4)


@pytest.mark.parametrize("column", ["paint", "tones"])
def test_the_lines_of_the_card_run(
    column: str, columns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export(columns, tmp_path / "out", "--column", column)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    lines = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(out))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(colours(4)[3])).save("picture.jpg", quality=100)
    scope: dict[str, Any] = {}
    exec(compile(lines, "card", "exec"), scope)
    ours = m3i_fast.load(columns, device="cpu", dtype=torch.float32)
    names, logits = ours.column_names[column], ours.classify(Image.open("picture.jpg"), column)[0]
    if column == "paint":
        assert scope["named"] == names[int(logits.argmax())] == "red"
    else:
        assert scope["named"] == [name for name, x in zip(names, logits, strict=True) if x > 0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--column", "tones"], "--column: expected with --task image-classification"),
        (["--task", "image-classification"], "expected a category head, got heads of the columns"),
        (
            ["--task", "image-classification", "--column", "light"],
            "column: expected a class or labels, got 'light'",
        ),
        (
            ["--task", "image-classification", "--column", "hue"],
            "column: expected a head of 'hue', got heads of the columns paint, tones, light alone",
        ),
    ],
)
def test_what_is_no_classifier_is_refused(
    words: list[str],
    said: str,
    columns: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(columns), str(tmp_path / "out"), "--to", "hf", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
