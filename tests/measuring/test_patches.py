"""Correspondence of any encoder's patches: its own pixels, and crops that no batch changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms import Normalize

from m3i_fast.engine.parallel.ranks import World
from m3i_fast.evaluation.dense.correspondence import measure_correspondence, two_crops
from m3i_fast.evaluation.dense.segmentation import (
    evaluate_segmentation,
    segmentation_scores,
    train_segmentation,
)
from m3i_fast.evaluation.dense.segmentation_folder import (
    open_folder,
    training_batches,
    whole_pictures,
)
from m3i_fast.measuring.encoders.encoder import EncoderSettings
from m3i_fast.measuring.encoders.opening import open_encoder
from m3i_fast.measuring.evaluate import EvaluationSettings, evaluate, plan
from m3i_fast.measuring.features import ExtractionSettings
from m3i_fast.measuring.measure import Measured, TrainingSettings
from m3i_fast.measuring.source import SourceSettings
from tests.measuring.pictures import TIMM, clip_folder, picture, timm_file
from tests.shared.masked_folder import masked_folder

CPU = torch.device("cpu")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Pictures of several sizes without labels, one of them of one colour, one broken."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for i in range(6):
        picture((40 * i, 90, 200), i, (70 + 9 * i, 64)).save(folder / f"{i}.png")
    Image.new("RGB", (80, 60), (9, 9, 9)).save(folder / "3.png")
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:80])
    return folder


def library(file: Path) -> tuple[Any, Normalize]:
    """A model of timm and its normalisation, without anything of this package."""
    model = timm.create_model(TIMM)
    model.load_state_dict(load_file(file))
    pixels = timm.data.resolve_model_data_config(model)
    return model.eval(), Normalize(pixels["mean"], pixels["std"])


def settings_of(bare: Path, tmp_path: Path, model: str, **more: Any) -> EvaluationSettings:
    cache = tmp_path / "cache"
    return EvaluationSettings(
        model=model,
        source=SourceSettings(path=bare, cache_dir=cache),
        extraction=ExtractionSettings(cache_dir=cache, batch_size=4),
        dtype=torch.float32,
        measures=("correspondence",),
        seed=5,
        **more,
    )


def measured(settings: EvaluationSettings) -> Measured:
    results = evaluate(settings, plan(settings), World(CPU))
    assert results is not None
    return results.encoders[0].measured["correspondence"]


def test_correspondence_is_that_of_timms_patches(bare: Path, tmp_path: Path) -> None:
    file = timm_file(tmp_path)
    settings = settings_of(bare, tmp_path, f"timm:{TIMM},checkpoint={file}")
    found = measured(settings)
    model, normalise = library(file)

    def embed(views: Tensor) -> Tensor:
        return model.forward_features(normalise(views / 255))[:, model.num_prefix_tokens :]

    rows = [0, 1, 2, 3, 5]
    pictures = [torch.from_numpy(np.array(Image.open(bare / f"{row}.png"))) for row in rows]
    pair = two_crops(pictures, torch.tensor(rows), size=160, seed=5)
    with torch.no_grad():
        expected = measure_correspondence(embed, lambda: [pair], CPU)
    np.testing.assert_allclose(found.arrays["share"], expected.share, atol=1e-6)
    assert found.arrays["rows"].tolist() == rows
    figures = {figure.name: figure for figure in found.figures}
    assert figures["patches found"].value == pytest.approx(expected.mean_share, abs=1e-6)
    assert figures["chance"].value == expected.mean_chance
    assert figures["patches found"].rows.tolist() == [0, 1, 2, 5]  # a plain picture asks nothing
    one = replace(settings, extraction=replace(settings.extraction, batch_size=1))
    np.testing.assert_allclose(measured(one).arrays["share"], found.arrays["share"], atol=1e-6)


def test_segmentation_is_the_head_on_timms_patches(bare: Path, tmp_path: Path) -> None:
    file, root = timm_file(tmp_path), masked_folder(tmp_path / "masks")
    spec = f"timm:{TIMM},checkpoint={file}"
    training = TrainingSettings(segmentation_steps=30)
    settings = settings_of(bare, tmp_path, spec, segmentation=root, training=training)
    told: list[str] = []
    results = evaluate(settings, plan(settings), World(CPU), tell=told.append)
    assert results is not None and f"{root}: 30 steps of 16 crops" in told[-2]
    assert [*results.encoders[0].measured] == ["correspondence", "segmentation"]
    found = results.encoders[0].measured["segmentation"]
    model, normalise = library(file)

    def encode(pictures: Tensor) -> Tensor:
        return model.forward_features(normalise(pictures / 255))

    train = open_folder(root, "training")
    validation = open_folder(root, "validation", num_classes=3)
    common: dict[str, Any] = {"num_classes": 3, "num_prefix": 1, "device": CPU}
    crops = training_batches(train, size=160, batch_size=5, seed=5)
    head, _ = train_segmentation(encode, crops, num_steps=30, seed=5, **common)
    whole = whole_pictures(validation, size=160)(0)
    confusion = evaluate_segmentation(encode, head, whole, window=160, **common)
    np.testing.assert_array_equal(found.arrays["confusion"], confusion)
    scores = segmentation_scores(confusion)
    values = [figure.value for figure in found.figures]
    assert values == [scores.mean_iou, scores.pixel_accuracy] and 0 < values[1] < 1
    results.save(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    of_model = stored["encoders"][0]["measures"]["segmentation"]
    assert of_model["figures"]["mean IoU"] == scores.mean_iou
    assert (of_model["settings"]["steps"], of_model["settings"]["classes"]) == (30, 3)
    iou = [math.nan if one is None else one for one in of_model["details"]["iou"]]
    np.testing.assert_array_equal(iou, scores.iou)
    assert math.isnan(iou[2])


def test_a_folder_without_masks_is_refused_before_anything_is_loaded(
    bare: Path, tmp_path: Path
) -> None:
    root = masked_folder(tmp_path / "masks")
    (root / "annotations" / "validation" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1.png: expected the mask of 1.png"):
        plan(settings_of(bare, tmp_path, "runs/absent", segmentation=root))
    named = replace(settings_of(bare, tmp_path, "pixels"), segmentation=root)
    with pytest.raises(ValueError, match="--segmentation: expected a folder"):
        replace(named, measures=("segmentation",), segmentation=None)


def test_pictures_without_contrast_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (50, 50), (90 * i,) * 3).save(folder / f"{i}.png")
    settings = settings_of(folder, tmp_path, f"open_clip:{clip_folder(tmp_path / 'clip')}")
    with pytest.raises(ValueError, match="a patch that is not plain, got none of 2"):
        measured(settings)


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_patch_tokens_are_what_the_features_are_of(kind: str, tmp_path: Path) -> None:
    spec = f"timm:{TIMM},checkpoint={timm_file(tmp_path)}"
    if kind == "open_clip":
        spec = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    encoder = open_encoder(spec, EncoderSettings(device=CPU, dtype=torch.float32))
    found = encoder.patch_tokens
    assert found is not None
    pictures = torch.stack([encoder.transform(picture((9, 80, 200), i)) for i in range(2)])
    assert pictures.shape[-1] == found.side
    tokens = found.encode(pictures)
    features = encoder.encode_pictures(pictures)
    torch.testing.assert_close(tokens[:, found.num_prefix :].mean(1), features["mean_1"])
    torch.testing.assert_close(tokens[:, 0], features["class_1"])
    square = picture((90, 80, 200), 3, (found.side, found.side))
    views = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    if kind == "open_clip":  # whose transform leaves a picture of that side as it is
        torch.testing.assert_close(found.normalise(views)[0], encoder.transform(square))
