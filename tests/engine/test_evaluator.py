"""What a run is measured by: without baselines, and by another data set's annotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine import evaluator
from m3i_fast.engine.evaluator import (
    build_averaged,
    evaluate,
    evaluate_untrained,
    load_objective,
    throughput,
)
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.held_out import describe_held_out
from m3i_fast.objectives.targets import normalise_views
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.sample_table import split_digest
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import demo, demo_method, shrink
from tests.shared.engine.small_run import TEXT
from tests.shared.pipelines.data import encode_image, info, sample, smooth_picture


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps, on data of which a part has labels."""
    out = tmp_path_factory.mktemp("runs") / "run"
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    Trainer(replace(cfg, num_threads=1), out).train()
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures, all of them annotated."""
    out = tmp_path_factory.mktemp("whole") / "openmoji"
    return openmoji.build(out, limit=60, num_merges=300, context_length=24)


def test_a_run_that_logged_nothing_has_no_throughput(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "throughput/img_s": "fast"}\n[]\n')
    with pytest.raises(ValueError, match="expected rows with throughput/img_s, got none"):
        throughput(tmp_path)


@pytest.mark.matrix
def test_without_baselines_the_trained_figures_are_the_same(run: Path, whole: Path) -> None:
    everything, hits, held_out = evaluate(run, data=whole)
    alone, hits_alone, _ = evaluate(run, data=whole, baselines=False)
    oracle = describe_held_out(
        _pictures(whole, "heldout", alone=True), _pictures(whole, "train", alone=False)
    )
    assert torch.equal(held_out.distance, oracle.distance)  # to variants of a concept, too
    assert torch.equal(held_out.group, oracle.group)
    assert everything["split_digest"] == split_digest(whole, "heldout")
    assert hits.keys() == {"trained", "ema", "untrained", "chance", "pixels"}
    assert hits_alone.keys() == {"trained", "ema"}
    of_trained = {name: of["trained"] for name, of in everything.items() if _has_sources(of)}
    assert {name: of["trained"] for name, of in alone.items() if _has_sources(of)} == of_trained
    assert {
        "knn_top1",
        "scene_miou",
        "patch_correspondence_centred_hard",
        "effective_rank",
    } <= of_trained.keys()
    of_captions = {
        "caption_to_image_recall_at_1",
        "caption_to_image_recall_at_5",
        "image_to_caption_recall_at_5",
        "caption_information_nats",
    }
    for name, of in alone.items():
        if _has_sources(of):
            without = name.removesuffix("_hard") in of_captions
            assert of.keys() == ({"trained"} if without else {"trained", "ema"}), name


def test_the_average_is_measured_as_the_encoder_that_it_is(run: Path) -> None:
    cfg = TrainConfig.load(run / "config.json")
    trained = load_objective(run, cfg)
    averaged, views = build_averaged(trained, cfg), torch.randint(0, 256, (3, 3, 64, 64))
    views = views.to(torch.uint8)
    online, other = (model.embed_images(views)[0] for model in (trained, averaged))
    assert not torch.allclose(online, other)
    with torch.no_grad():
        rows = normalise_views(views, torch.arange(3), torch.float32)
        assert torch.equal(other, trained.target_encoder(rows))
    assert averaged.embed_images(views)[1] is None and not averaged.training


def test_a_run_without_an_average_has_none(dataset: Path, tmp_path: Path) -> None:
    cfg = shrink(demo_method("supervised"), path=dataset, num_classes=9, text=TEXT)
    Trainer(replace(cfg, num_threads=1, num_steps=1), tmp_path / "run").train()
    assert evaluate(tmp_path / "run", baselines=False)[1].keys() == {"trained"}


def test_what_was_not_trained_is_measured_alone(run: Path) -> None:
    beside, hits_beside, _ = evaluate(run)
    alone, hits, _ = evaluate_untrained(TrainConfig.load(run / "config.json"))
    assert hits.keys() == {"untrained", "chance", "pixels"}
    for name, of in alone.items():
        if isinstance(of, dict):
            trained = ("trained", "ema")
            expected = {who: value for who, value in beside[name].items() if who not in trained}
            assert of == expected, name
    for who, result in hits.items():
        for name, values in result.hits.items():
            assert torch.equal(values.nan_to_num(7), hits_beside[who].hits[name].nan_to_num(7))


def _pictures(data: Path, split: str, *, alone: bool) -> Iterator[Batch]:
    size = 72  # as they were packed, and not as the model takes them
    return evaluation_batches(
        data, split, image_size=size, batch_size=50, representatives_only=alone
    )


def _has_sources(value: object) -> bool:
    return isinstance(value, dict) and "trained" in value


def test_the_data_of_the_measures_has_the_tokenizer_of_the_run(run: Path, tmp_path: Path) -> None:
    other = openmoji.build(tmp_path / "other", limit=60, num_merges=200, context_length=24)
    with pytest.raises(ValueError, match=r"data: expected .*other to have the tokenizer of"):
        evaluate(run, data=other)


def test_held_out_pictures_without_a_class_are_told_before_anything_is_measured(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    described = info(tokenizer=read_manifest(dataset).tokenizer)
    pictures = [encode_image(smooth_picture(i, 20, 20)) for i in range(10)]
    samples = [sample(i, picture, label=(i >= 2) - 1) for i, picture in enumerate(pictures)]
    splits = {"heldout": samples[:5], "train": samples[5:]}
    other = write_dataset(tmp_path / "other", splits, described, seed=0, samples_per_shard=8)
    message = r"split heldout of .*other: expected a class of every picture, got 2 of 5 without: "
    with pytest.raises(ValueError, match=message + "measure what they have by m3i-fast evaluate"):
        evaluate(run, data=other)


def test_data_sets_that_a_cpu_does_not_fit_probes_to_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluator, "MOST_PICTURES", 30)
    with pytest.raises(ValueError, match=r"at most 30 pictures a split.* m3i-fast evaluate RUN --"):
        evaluate(run)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["evaluate", str(run)]) == 2
    assert "evaluate RUN: expected one process, or --data DATA" in capsys.readouterr().err


def test_a_run_on_a_mixture_is_measured_on_the_data_that_are_named(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = TrainConfig.load(run / "config.json")
    mixture = (f"{dataset}:train:1", f"{dataset}:train:2")
    cfg = replace(cfg, data=replace(cfg.data, mixture=mixture, path=tmp_path / "absent"))
    cfg.save(tmp_path / "config.json")
    assert main(["evaluate", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--held-out-data: expected the data set to measure on, since {tmp_path} was" in said
    other = openmoji.build(tmp_path / "other", limit=60, num_merges=200, context_length=24)
    assert main(["evaluate", str(tmp_path), "--held-out-data", str(other)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "to have the tokenizer of the run" in said
