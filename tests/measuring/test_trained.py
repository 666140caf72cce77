"""Measures that train have the figures of their functions on a library's own features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.special import softmax
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from m3i_fast.engine.fine_tuning import fine_tune
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.teacher import TimmEncoder
from m3i_fast.evaluation.batches import LabelledBatch
from m3i_fast.evaluation.probes.attentive import attentive_probe
from m3i_fast.evaluation.probes.linear_sweep import epoch_batches, kept_out, linear_sweep
from m3i_fast.evaluation.statistics import hits_interval
from m3i_fast.measuring.evaluate import EvaluationSettings, evaluate, plan
from m3i_fast.measuring.features import ExtractionSettings
from m3i_fast.measuring.measure import Measured, TrainingSettings
from m3i_fast.measuring.measures import MEASURES, chosen_measures
from m3i_fast.measuring.results import Results
from m3i_fast.measuring.source import SourceSettings
from m3i_fast.measuring.trained import fine_tuning_config, linear_inputs
from tests.measuring.pictures import COLOURS, TIMM, clip_folder, image_folder, timm_file

CPU = torch.device("cpu")
BATCH = 8
GROUP = np.arange(15) // 3


class Library:
    """A model of timm and the pictures of a folder, without anything of this package."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.model = timm.create_model(TIMM)
        self.model.load_state_dict(load_file(file))
        self.model.reset_classifier(0)
        self.model.eval().requires_grad_(False)
        transform = create_transform(**resolve_model_data_config(self.model))
        self.pictures, self.label = {}, {}
        for split in ("train", "val"):
            files = sorted((folder / split).rglob("*.png"))
            self.pictures[split] = torch.stack([transform(Image.open(file)) for file in files])
            names = [file.parent.name for file in files]
            self.label[split] = np.array([[*COLOURS].index(name) for name in names])

    def tokens(self, pictures: Tensor) -> Tensor:
        return self.model.forward_features(pictures)

    def batches(
        self, split: str, rows: Callable[[int], Any]
    ) -> Callable[[int], list[LabelledBatch]]:
        pictures, label = self.pictures[split], torch.from_numpy(self.label[split])
        return lambda epoch: [(pictures[index], label[index]) for index in rows(epoch)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data", each=5)


@pytest.fixture
def library(folder: Path, tmp_path: Path) -> Library:
    return Library(timm_file(tmp_path), folder)


def settings_of(folder: Path, tmp_path: Path, *measures: str, **more: Any) -> EvaluationSettings:
    cache = tmp_path / "cache"
    training = TrainingSettings(linear_steps=20, attentive_epochs=3, fine_tuning_epochs=2)
    given: dict[str, Any] = {
        "model": f"timm:{TIMM},checkpoint={tmp_path / f'{TIMM}.safetensors'}",
        "source": SourceSettings(path=folder, cache_dir=cache),
        "extraction": ExtractionSettings(cache_dir=cache, batch_size=BATCH),
        "dtype": torch.float32,
        "measures": measures,
        "training": training,
        "seed": 3,
    }
    return EvaluationSettings(**{**given, **more})


def measured(settings: EvaluationSettings, told: list[str] | None = None) -> Results:
    """Measure with training pictures in groups of three."""
    planned = plan(settings)
    source = planned.source
    if source.train is not None:
        grouped = replace(source.train, group=np.arange(len(source.train)) // 3)
        planned = replace(planned, source=replace(source, train=grouped))
    tell = (told if told is not None else []).append
    results = evaluate(settings, planned, World(CPU), tell=tell)
    assert results is not None
    return results


def expect_predictions(found: Measured, logits: np.ndarray, label: np.ndarray) -> None:
    hits = logits.argmax(1) == label
    assert found.figures[0].value == hits.mean() and len(found.figures) == 1  # three classes
    np.testing.assert_array_equal(found.figures[0].hits, hits)
    np.testing.assert_array_equal(found.arrays["predicted"], logits.argmax(1))
    np.testing.assert_allclose(
        found.arrays["confidence"], softmax(logits, axis=1).max(1), rtol=1e-5
    )
    assert found.details["by_class"] == {
        name: hits[label == number].mean() for number, name in enumerate(COLOURS)
    }


def test_linear_is_the_sweep_over_timms_layers(
    folder: Path, library: Library, tmp_path: Path
) -> None:
    told: list[str] = []
    settings = settings_of(folder, tmp_path, "linear", baselines=("pixels",))
    results = measured(settings, told)
    assert any("about 20 steps of 1,024 rows" in text for text in told)
    features: dict[str, list[np.ndarray]] = {}
    for split in ("train", "val"):
        layers = library.model.forward_intermediates(
            library.pictures[split],
            indices=4,
            norm=True,
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        classes = [prefix[:, 0].numpy() for _, prefix in reversed(layers)]
        mean = layers[-1][0].mean(1).numpy()
        of_split = {
            "mean_1": mean,
            "class_1": classes[0],
            "class_1+mean_1": np.hstack([classes[0], mean]),
            "class_1+class_2+class_3+class_4": np.hstack(classes),
            "class_1+class_2+class_3+class_4+mean_1": np.hstack([*classes, mean]),
        }
        for name, rows in of_split.items():
            features.setdefault(name, []).append(rows)
    expected = linear_sweep(
        {name: (train, val) for name, (train, val) in features.items()},
        library.label["train"],
        library.label["val"],
        num_steps=20,
        seed=3,
        device=CPU,
        train_group=GROUP,
    )
    ours = results.encoders[0].measured["linear"]
    expect_predictions(ours, expected.logits, library.label["val"])
    chosen = (ours.settings["input"], ours.settings["learning_rate"])
    assert chosen == (expected.chosen_input, expected.chosen_rate)
    assert (ours.settings["fit_rows"], ours.settings["choice_rows"]) == (12, 3)
    sweep = ours.details["sweep"]
    np.testing.assert_array_equal([*sweep["on measured rows"].values()], expected.top1)
    np.testing.assert_array_equal(
        [*sweep["on the rows of the choice"].values()], expected.choice_top1
    )
    theirs = results.encoders[1].measured["linear"]
    assert theirs.settings["input"] == "mean_1"
    interval = hits_interval(
        ours.figures[0].hits, theirs.figures[0].hits, results.source.measured.group
    )
    assert results.comparisons()["pixels"]["linear", "top 1"].difference == interval.difference


def test_inputs_are_the_encoders(folder: Path, tmp_path: Path) -> None:
    assert [*linear_inputs(["mean_1"])] == ["mean_1"]
    assert [*linear_inputs(["image"])] == ["image"]  # of a tower without layers
    assert [*linear_inputs(["mean_1", "mean_2", "image"])] == ["mean_1", "mean_1+mean_2"]
    clip = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    results = measured(settings_of(folder, tmp_path, "linear", model=clip))
    sweep = results.encoders[0].measured["linear"].details["sweep"]
    assert len(sweep["on measured rows"]) == 5


def test_attentive_is_the_probe_of_timms_tokens(
    folder: Path, library: Library, tmp_path: Path
) -> None:
    results = measured(settings_of(folder, tmp_path, "attentive"))
    fit, choice = kept_out(library.label["train"], GROUP, 0.1, 3)
    in_order = [range(start, min(start + BATCH, 15)) for start in range(0, 15, BATCH)]
    expected = attentive_probe(
        library.tokens,
        library.batches(
            "train", lambda epoch: epoch_batches(fit, batch_size=BATCH, seed=3, epoch=epoch)
        ),
        library.batches("train", lambda epoch: [choice]),
        library.batches("val", lambda epoch: in_order),
        num_classes=3,
        num_steps=3 * (len(fit) // BATCH),
        seed=3,
        device=CPU,
    )
    found = results.encoders[0].measured["attentive"]
    expect_predictions(found, expected.logits, library.label["val"])
    np.testing.assert_allclose(found.arrays["loss"], expected.loss, rtol=1e-5)
    assert found.details["on measured rows"] == expected.top1.tolist()
    assert found.details["on the rows of the choice"] == expected.choice_top1.tolist()
    assert (found.settings["fit_rows"], found.settings["choice_rows"]) == (12, 3)


def test_fine_tuning_trains_timms_model(folder: Path, library: Library, tmp_path: Path) -> None:
    results = measured(settings_of(folder, tmp_path, "fine-tuning"))
    model = library.model
    expected = fine_tune(
        TimmEncoder(model, num_prefix=model.num_prefix_tokens, dim=model.num_features),
        library.batches(
            "train",
            lambda epoch: epoch_batches(np.arange(15), batch_size=BATCH, seed=3, epoch=epoch),
        ),
        library.batches("val", lambda epoch: [range(15)]),
        cfg=fine_tuning_config(2),
        num_classes=3,
        steps_per_epoch=1,
        batch_size=BATCH,
        seed=3,
        device=CPU,
    )
    found = results.encoders[0].measured["fine-tuning"]
    expect_predictions(found, expected.logits, library.label["val"])
    np.testing.assert_allclose(found.arrays["loss"], expected.loss, rtol=1e-5)
    assert (found.settings["epochs"], found.settings["steps"]) == (2, 2)


def test_published_settings_stay_with_published_epochs() -> None:
    cfg = fine_tuning_config(50)
    assert (cfg.warmup_epochs, cfg.base_lr, cfg.layer_decay) == (5.0, 1e-3, 0.75)
    assert fine_tuning_config(10).warmup_epochs == 1.0


def test_what_cannot_train_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def refused(*measures: str, **more: Any) -> str:
        settings = settings_of(folder, tmp_path, *measures, **more)
        with pytest.raises(ValueError) as error:
            measured(settings)
        return str(error.value)

    clip = f"open_clip:{clip_folder(tmp_path / 'clip')}"
    assert f"{clip} cannot be fine-tuned; expected a ViT" in refused("fine-tuning", model=clip)
    assert "pixels has no square grid" in refused("attentive", model="pixels")
    source = SourceSettings(path=folder, train_split="absent", cache_dir=tmp_path / "cache")
    for name in ("linear", "attentive", "fine-tuning"):
        assert f"{name}: no labelled rows to fit to" in refused(name, source=source)
    for name in ("linear_steps", "attentive_epochs", "fine_tuning_epochs"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected 1 or more"):
            TrainingSettings(**{name: 0})


def test_an_odd_batch_of_fine_tuning_is_made_even_and_one_is_refused(
    folder: Path, library: Library, tmp_path: Path
) -> None:
    settings = settings_of(folder, tmp_path, "fine-tuning")
    odd = replace(settings, extraction=replace(settings.extraction, batch_size=7))
    found = measured(odd).encoders[0].measured["fine-tuning"]
    assert (found.settings["batch_size"], found.settings["steps"]) == (6, 4)
    one = replace(settings, extraction=replace(settings.extraction, batch_size=1))
    with pytest.raises(ValueError, match="--batch-size: expected 2 or more"):
        measured(one)


def test_measures_that_take_long_are_measured_by_name_alone() -> None:
    assert [*chosen_measures(())] == ["knn", "few-labels", "zero-shot", "retrieval"]
    named = ["linear", "attentive", "fine-tuning", "correspondence"]
    assert [*chosen_measures(named)] == named
    assert {name for name, row in MEASURES.items() if row.takes is not None} == {
        *named,
        "segmentation",
    }
