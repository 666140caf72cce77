"""A run keeps what its model needs of the data, so that these may go."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.config import TrainConfig
from m3i_fast.engine.evaluator import evaluate
from m3i_fast.engine.run.data_record import DataRecord, read_record, record_data
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo, ColumnsInfo
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.opened.mixture import read_described
from m3i_fast.pipelines.sources import openmoji
from tests.shared.engine.small_run import small_run


def short(dataset: Path, **overrides: object) -> TrainConfig:
    return small_run(dataset, num_steps=2, log_every=1, checkpoint_every=1, **overrides)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("record") / "run"
    Trainer(short(dataset), out).train()
    return out


def test_it_is_what_the_manifest_says(run: Path, dataset: Path) -> None:
    written, manifest = json.loads((run / "data.json").read_text()), read_manifest(dataset)
    assert written["class_names"] == list(manifest.class_names)
    assert written["tokenizer"] == manifest.tokenizer.as_dict()
    assert written["datasets"] == [
        {"name": manifest.name, "split": "train", "digest": manifest.digest}
    ]
    assert written["preprocessing"] == {
        "size": TrainConfig.load(run / "config.json").vision.image_size,
        "interpolation": "cubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert read_record(run) == record_data(TrainConfig.load(run / "config.json"), manifest)


def test_of_a_mixture_it_names_all_classes_and_data_sets(dataset: Path) -> None:
    cfg = short(dataset)
    parts = (f"{dataset}:train:1", f"{dataset}:heldout:2")
    cfg = replace(cfg, data=replace(cfg.data, mixture=parts))
    record = record_data(cfg, read_described(cfg.data))
    assert record.class_names == read_manifest(dataset).class_names
    assert [(each.split, each.digest) for each in record.datasets] == [
        (split, read_manifest(dataset).digest) for split in ("train", "heldout")
    ]


def test_a_run_that_cannot_write_it_has_not_begun(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(record: DataRecord, path: Path) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(DataRecord, "save", full)
        Trainer(short(dataset), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_resume_adds_it_to_a_run_of_an_older_version(
    run: Path, dataset: Path, tmp_path: Path
) -> None:
    older = shutil.copytree(run, tmp_path / "run")
    (older / "data.json").unlink()
    assert read_record(older) is None
    Trainer(short(dataset), older, resume=True).close()
    assert (older / "data.json").read_bytes() == (run / "data.json").read_bytes()


def test_data_that_are_handed_in_leave_none(dataset: Path, tmp_path: Path) -> None:
    cfg = short(dataset)
    loader = Loader(cfg.data, images_per_input=cfg.objective.mixing.images_per_input)

    class Others:
        """The batches of a loader that the trainer knows nothing of."""

        def __getattr__(self, name: str) -> Any:
            return getattr(loader, name)

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            return next(loader)

    Trainer(cfg, tmp_path / "run", data=Others()).train()
    assert not (tmp_path / "run" / "data.json").exists()


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("version", 2, "version"),
        ("class_names", "cat", "class_names"),
        ("colour", 1, "colour"),
        ("preprocessing", {"size": 1, "interpolation": "nearest"}, "interpolation"),
    ],
)
def test_a_damaged_one_is_named(
    run: Path, tmp_path: Path, entry: str, value: object, said: str
) -> None:
    tree = json.loads((run / "data.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps({**tree, entry: value}))
    with pytest.raises(ValueError, match=rf"data\.json: .*{said}"):
        read_record(tmp_path)


def test_pixels_that_are_normalised_otherwise_are_refused(run: Path, tmp_path: Path) -> None:
    tree = json.loads((run / "data.json").read_text())
    tree["preprocessing"]["mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "data.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"expected pixels of mean \(0\.485, .*got \(0\.5, "):
        read_record(tmp_path)


def test_evaluating_on_other_data_needs_none_of_the_runs_own(run: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    cfg = TrainConfig.load(moved / "config.json")
    replace(cfg, data=replace(cfg.data, path=tmp_path / "gone")).save(moved / "config.json")
    other = openmoji.build(tmp_path / "other", limit=60, num_merges=200, context_length=24)
    with pytest.raises(ValueError, match=r"expected .*other to have the tokenizer of the run"):
        evaluate(moved, data=other)
    (moved / "data.json").unlink()
    with pytest.raises(FileNotFoundError, match="gone: expected a dataset directory"):
        evaluate(moved, data=other)


def test_named_columns_are_kept_with_their_names(dataset: Path, tmp_path: Path) -> None:
    column = ColumnInfo(name="tags", kind="labels", names=("red", "big"), size=1)
    splits = {
        name: replace(split, columns=ColumnsInfo(file=f"{name}.columns", num_bytes=0, sha256=""))
        for name, split in read_manifest(dataset).splits.items()
    }
    manifest = replace(read_manifest(dataset), columns=(column,), splits=splits)
    record = record_data(short(dataset), manifest)
    record.save(tmp_path)
    assert read_record(tmp_path) == record
    assert [(c.name, c.kind, c.names) for c in record.columns] == [
        ("tags", "labels", ("red", "big"))
    ]
