"""Several data sets as one: classes, labels, ids, order and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3i_fast.config.data import LoaderConfig, MixturePart, ViewConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.sample_table import BAD, ROW, write_table
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.opened.mixture import MAX_ID, MixedData, read_described
from m3i_fast.pipelines.sample_order.positions import shuffled
from tests.shared.pipelines.data import (
    TOKENIZER,
    edit_manifest,
    encode_image,
    equal,
    info,
    sample,
    smooth_picture,
)

SIZES = (12, 5, 7)
CLASSES = (("cat", "dog", "owl"), ("owl", "ant", "cat"), ())


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixture")
    picture = encode_image(smooth_picture(0, 20, 20))

    def packed(number: int, **changes: Any) -> Path:
        labels = {} if CLASSES[number] else {"label": -1}
        samples = [sample(i, picture, **labels) for i in range(SIZES[number])]
        about = info(class_names=CLASSES[number], **changes)
        name = f"{number}-{len(changes)}"
        return write_dataset(folder / name, {"train": samples}, about, seed=0, samples_per_shard=8)

    longer = replace(TOKENIZER, context_length=13)
    return [*(packed(number) for number in range(3)), packed(1, tokenizer=longer)]


def mixed(paths: list[Path], weights: tuple[float, ...] = (0.6, 0.3, 0.1)) -> MixedData:
    parts = tuple(f"{p}:train:{w}" for p, w in zip(paths, weights, strict=False))
    return MixedData.read(LoaderConfig(mixture=parts))


def test_a_config_says_where_which_and_how_much() -> None:
    cfg = LoaderConfig(mixture=("data/a:train:0.7", "s3://bucket/b:held:out:3"))
    first, second = cfg.mixture_parts
    assert first == MixturePart(path=Path("data/a"), split="train", weight=0.7)
    assert (second.path, second.split, second.weight) == (Path("s3://bucket/b:held"), "out", 3.0)
    assert LoaderConfig().mixture_parts == ()
    for wrong in ("data/a", "data/a:train", "data/a:train:x", "data/a:train:0", ":train:1", "a::1"):
        with pytest.raises(ValueError, match="mixture: expected DIR:SPLIT:WEIGHT.*got"):
            LoaderConfig(mixture=(wrong,))
    for wrong in ("a:train:inf", "a:train:nan", "a:train:-1"):
        with pytest.raises(ValueError, match="a weight above 0"):
            LoaderConfig(mixture=("a:train:1", wrong))


def test_classes_of_one_name_are_one_class(paths: list[Path]) -> None:
    data = mixed(paths)
    assert data.class_names == ("cat", "dog", "owl", "ant")
    assert data.sizes == SIZES and data.tokenizer == TOKENIZER
    datasets = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])
    own = np.array([-1, 0, 1, 2, -1, 0, 1, 2, -1])
    assert data.labels(datasets, own).tolist() == [-1, 0, 1, 2, -1, 2, 3, 0, -1]
    names = [CLASSES[d][label] for d, label in zip(datasets, own, strict=True) if label >= 0]
    assert names == [data.class_names[i] for i in data.labels(datasets, own) if i >= 0]


def test_ids_of_two_data_sets_differ(paths: list[Path]) -> None:
    data = mixed(paths)
    datasets, own = np.array([0, 1, 2]), np.array([5, 5, MAX_ID - 1])
    assert data.ids(datasets, own).tolist() == [5, MAX_ID + 5, 3 * MAX_ID - 1]
    assert data.ids(datasets, np.array([-3, MAX_ID, 0])).tolist() == [-1, -1, 2 * MAX_ID]


@pytest.mark.parametrize("images", [1, 2])
def test_an_input_is_of_one_data_set_as_often_as_its_weight_says(
    paths: list[Path], images: int
) -> None:
    data = mixed(paths)
    rows = data.rows_at(np.arange(1000), seed=4, images_per_input=images)
    datasets, own = data.split_rows(rows)
    assert (datasets.reshape(-1, images) == datasets.reshape(-1, images)[:, :1]).all()
    counts = np.bincount(datasets, minlength=3)
    assert np.abs(counts - 1000 * np.array([0.6, 0.3, 0.1])).max() <= images
    for d, size in enumerate(SIZES):
        there = own[datasets == d]
        assert (there == shuffled(np.arange(len(there)), size=size, seed=4, dataset=d)).all()
    again = data.rows_at(np.arange(400, 700), seed=4, images_per_input=images)
    assert (again == rows[400:700]).all()


def test_a_digest_is_of_data_splits_and_weights(paths: list[Path]) -> None:
    digests = {
        mixed(paths[:2], (0.6, 0.3)).digest,
        mixed(paths[:2], (0.5, 0.5)).digest,
        mixed([paths[1], paths[0]], (0.6, 0.3)).digest,
        mixed(paths[:3]).digest,
    }
    assert len(digests) == 4
    assert mixed(paths[:2], (6, 3)).digest in digests  # the same shares


def test_one_data_set_is_described_by_its_manifest(paths: list[Path]) -> None:
    cfg = LoaderConfig(path=paths[0])
    assert read_described(cfg) == read_manifest(paths[0])
    cfg = replace(cfg, mixture=(f"{paths[1]}:train:1", f"{paths[0]}:train:1"))
    described = read_described(cfg)
    assert described.class_names == ("owl", "ant", "cat", "dog")


def test_what_does_not_go_together_is_refused(paths: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"1-1/manifest.json: tokenizer: expected that of .*0-0"):
        mixed([paths[0], paths[3]])
    with pytest.raises(ValueError, match=r"split: expected one of \['train'\], got 'held'"):
        MixedData.read(LoaderConfig(mixture=(f"{paths[0]}:held:1",)))
    with pytest.raises(FileNotFoundError):
        MixedData.read(LoaderConfig(mixture=(f"{paths[0]}/absent:train:1",)))


def test_a_loader_takes_from_each_by_weight_on_any_ranks(paths: list[Path]) -> None:
    """Both backends, the same on any split, labels and ids as those of one data set."""
    parts = tuple(f"{path}:train:{w}" for path, w in zip(paths, (0.5, 0.3, 0.2), strict=False))
    view = ViewConfig(size=8)
    cfg = LoaderConfig(mixture=parts, batch_size=8, global_views=view, seed=3, backend="torch")
    whole = Loader(cfg, images_per_input=2)
    assert whole.manifest.class_names == ("cat", "dog", "owl", "ant")
    ranks = [
        Loader(replace(cfg, batch_size=4, backend="dali"), rank=r, num_ranks=2, images_per_input=2)
        for r in range(2)
    ]
    data = mixed(paths, (0.5, 0.3, 0.2))
    counts = np.zeros(3, int)
    for _ in range(10):
        batch = next(whole)
        halves = [next(loader) for loader in ranks]
        order = torch.cat([half.position for half in halves]).argsort()
        for ours, *others in zip(batch.tensors(), *(h.tensors() for h in halves), strict=True):
            assert torch.equal(ours, torch.cat(others)[order])
        datasets, own = np.divmod(batch.sample_id.numpy(), MAX_ID)
        assert (datasets[::2] == datasets[1::2]).all()  # an input comes of one data set
        rows = data.rows_at(batch.position.numpy(), seed=3, images_per_input=2)
        assert np.array_equal(data.split_rows(rows)[0], datasets)
        for label, d, index in zip(batch.label.tolist(), datasets, own, strict=True):
            expected = CLASSES[d][index % 3] if CLASSES[d] else None
            assert (whole.manifest.class_names[label] if label >= 0 else None) == expected
        counts += np.bincount(datasets, minlength=3)
    assert (np.abs(counts / 2 - 40 * np.array([0.5, 0.3, 0.2])) <= 1).all()  # of inputs
    again = Loader(cfg, images_per_input=2)
    again.load_state_dict(ranks[0].state_dict())
    assert equal(next(again), next(whole))
    with pytest.raises(ValueError, match="order: expected '1, mixed by 2', got '1, mixed by 1'"):
        Loader(cfg).load_state_dict(ranks[0].state_dict())


def marked(path: Path, bad: list[int]) -> None:
    """Mark samples in the table, with a digest that is right."""
    table = np.fromfile(path / "train.samples", ROW)
    table["flags"][np.isin(table["sample_id"], bad)] |= BAD
    made = asdict(write_table(path / "train.samples", [table]))
    edit_manifest(path, lambda raw: raw["splits"]["train"].update(table=made, num_bad=len(bad)))


def test_a_sample_is_replaced_by_one_of_its_own_data_set(paths: list[Path], tmp_path: Path) -> None:
    """Marked or found to be corrupt: shares stay, and both images of an input are of one set."""
    weights = (0.5, 0.3, 0.2)
    own = [Path(shutil.copytree(path, tmp_path / path.name)) for path in paths[:3]]
    marked(own[0], list(range(6)))
    parts = tuple(f"{path}:train:{w}" for path, w in zip(own, weights, strict=True))
    cfg = LoaderConfig(
        mixture=parts, batch_size=8, global_views=ViewConfig(size=8), seed=3, backend="torch"
    )
    loader = Loader(cfg, images_per_input=2)
    row = np.fromfile(own[1] / "train.samples", ROW)[2]
    shard = own[1] / read_manifest(own[1]).splits["train"].shards[row["shard"]].file
    content = bytearray(shard.read_bytes())
    content[int(row["offset"]) + 1] ^= 1
    shard.write_bytes(content)
    counts, plain = np.zeros(3), mixed(own, weights)
    for step in range(1, 16):
        batch = next(loader)
        datasets, ids = np.divmod(batch.sample_id.numpy(), MAX_ID)
        rows = plain.rows_at(batch.position.numpy(), seed=3, images_per_input=2)
        assert (datasets == plain.split_rows(rows)[0]).all()
        assert not (ids[datasets == 0] < 6).any()
        assert not (ids[datasets == 1] == row["sample_id"]).any()
        assert (datasets[::2] == datasets[1::2]).all()
        counts += np.bincount(datasets, minlength=3) / 2
        assert (np.abs(counts - 4 * step * np.array(weights)) <= 1).all()


@pytest.mark.parametrize("column", ["sample_id", "group_id"])
def test_an_id_that_cannot_be_mixed_is_told_with_its_sample(
    paths: list[Path], tmp_path: Path, column: str
) -> None:
    own = [Path(shutil.copytree(path, tmp_path / path.name)) for path in paths[:2]]
    cfg = LoaderConfig(
        mixture=tuple(f"{path}:train:1" for path in own),
        batch_size=8,
        global_views=ViewConfig(size=8),
        backend="torch",
    )
    table = np.fromfile(own[1] / "train.samples", ROW)
    table[2][column] = MAX_ID + 3
    made = asdict(write_table(own[1] / "train.samples", [table]))
    edit_manifest(own[1], lambda raw: raw["splits"]["train"].update(table=made))
    skipped = tmp_path / "skipped.jsonl"
    loader = Loader(cfg, skipped_file=skipped)
    ids = np.concatenate([next(loader).sample_id.numpy() for _ in range(4)])
    assert (ids >= 0).all()
    (told,) = [json.loads(line) for line in skipped.read_text().splitlines()]
    assert told["sample_id"] == table[2]["sample_id"]
    assert Path(told["file"]).parent == own[1]
    expected = f"sample {table[2]['sample_id']} of group {table[2]['group_id']}"
    assert "ids of 0 to 2**48 - 1 in a mixture" in told["reason"] and expected in told["reason"]
