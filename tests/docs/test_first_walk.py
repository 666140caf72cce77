"""A newcomer's walk: pictures in folders of their classes, from the files to a loaded model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

import m3i_fast
from m3i_fast.cli import main
from tests.shared.pipelines.data import smooth_picture

CLASSES = ("cat", "dog", "horse")
# vit_ti at a size that trains in seconds; a recipe's batch goes with its rate and its steps.
SMALL = (
    *("--num-steps=2", "--optim.lr=1e-4", "--data.batch-size=8", "--data.num-threads=1"),
    *("--data.global-views.size=32", "--vision.image-size=32", "--vision.depth=1"),
    *("--objective.mixing.mask-block=1", "--device=cpu"),
)


def test_class_folders_are_packed_trained_evaluated_exported_and_loaded_without_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(CLASSES):
        Path("pictures", name).mkdir(parents=True)
        for i in range(20):
            picture = Image.fromarray(smooth_picture(20 * number + i, 48, 56))
            picture.save(Path("pictures", name, f"{i}.png"))
    for command in (
        "data pack pictures data/mine --split heldout=0.2",
        "data verify data/mine --decode",
        f"train vit_ti --out runs/mine --data.path data/mine {' '.join(SMALL)}",
        "evaluate runs/mine",
        "evaluate runs/mine --data data/mine --out evaluated",
        "report runs/mine",
        "export runs/mine mine-hf --to hf",
        "export runs/mine mine-st --to safetensors",
    ):
        assert main(command.split()) == 0, command
        warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert [record.getMessage() for record in warned] == [], command
        assert [str(warning.message) for warning in recwarn] == [], command
    for place in ("runs/mine", "mine-st"):
        model = m3i_fast.load(place, device="cpu")
        with Image.open("pictures/cat/0.png") as picture:
            assert model.classify(picture).shape == (1, len(CLASSES))
        with pytest.raises(ValueError, match="its data had no captions"):
            model.encode_text("a cat")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in recwarn] == []
