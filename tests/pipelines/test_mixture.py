"""Several data sets as one: classes, labels, ids, order and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.config.data import LoaderConfig, MixturePart
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.mixture import MAX_ID, MixedData, read_described
from m3i_fast.pipelines.order import shuffled
from tests.shared.pipelines.data import TOKENIZER, encode_image, info, sample, smooth_picture

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
    pairs = zip(paths, weights, strict=False)
    return MixedData.read([MixturePart(path=p, split="train", weight=w) for p, w in pairs])


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
    with pytest.raises(ValueError, match=r"expected ids of 0 to 2\*\*48 - 1 in a mixture, got"):
        data.ids(datasets, np.array([0, MAX_ID, 0]))


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
        MixedData.read([MixturePart(path=paths[0], split="held", weight=1)])
    with pytest.raises(FileNotFoundError):
        MixedData.read([MixturePart(path=paths[0] / "absent", split="train", weight=1)])
