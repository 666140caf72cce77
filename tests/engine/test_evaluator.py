"""What a run is measured by: without baselines, and by another data set's annotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.evaluator import evaluate, evaluate_untrained, throughput
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.held_out import describe_held_out
from m3i_fast.pipelines import openmoji
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.shards import split_digest
from m3i_fast.recipes import demo, shrink
from tests.engine.test_parallel import TEXT


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


def test_without_baselines_the_trained_figures_are_the_same(run: Path, whole: Path) -> None:
    everything, hits, held_out = evaluate(run, data=whole)
    alone, hits_alone, _ = evaluate(run, data=whole, baselines=False)
    oracle = describe_held_out(
        _pictures(whole, "heldout", alone=True), _pictures(whole, "train", alone=False)
    )
    assert torch.equal(held_out.distance, oracle.distance)  # to variants of a concept, too
    assert torch.equal(held_out.group, oracle.group)
    assert everything["split_digest"] == split_digest(whole, "heldout")
    assert hits.keys() == {"trained", "untrained", "chance", "pixels"}
    assert hits_alone.keys() == {"trained"}
    of_trained = {name: of["trained"] for name, of in everything.items() if _has_sources(of)}
    assert {name: of["trained"] for name, of in alone.items() if _has_sources(of)} == of_trained
    assert {
        "knn_top1",
        "scene_miou",
        "patch_correspondence_centred_hard",
        "effective_rank",
    } <= of_trained.keys()
    assert all(of.keys() == {"trained"} for of in alone.values() if _has_sources(of))


def test_what_was_not_trained_is_measured_alone(run: Path) -> None:
    beside, hits_beside, _ = evaluate(run)
    alone, hits, _ = evaluate_untrained(TrainConfig.load(run / "config.json"))
    assert hits.keys() == {"untrained", "chance", "pixels"}
    for name, of in alone.items():
        if isinstance(of, dict):
            expected = {who: value for who, value in beside[name].items() if who != "trained"}
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
