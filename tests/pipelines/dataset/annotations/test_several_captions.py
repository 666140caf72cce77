"""Several captions a picture, from the packer to the batch: which one, when, and on which rank."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.keyed_draws import Purpose, words
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    TOKENIZER,
    Packer,
    encode_image,
    equal,
    sample,
    several_captions,
    smooth_picture,
    take,
)

VIEWS = ViewConfig(count=1, size=4, jitter_probability=0, gray_probability=0)
T = TOKENIZER.context_length


@pytest.fixture
def cfg(mixture: Path) -> LoaderConfig:
    return LoaderConfig(path=mixture, batch_size=4, global_views=VIEWS, seed=5)


def chosen(batch: Batch) -> dict[int, int]:
    """{sample_id: which of its captions, -1 of none}, every row being one of them and no more."""
    found = {}
    for i, index in enumerate(batch.sample_id.tolist()):
        number, row = int(batch.num_tokens[i]), batch.token_ids[i].tolist()
        known = [ids.tolist() for ids in several_captions(index)]
        assert row[number:] == [0] * (T - number)
        assert (row[:number] in known) if known else number == 0
        found[index] = known.index(row[:number]) if known else -1
        assert batch.label[i] == (-1 if index % 3 == 0 else index % 3)
    return found


def epochs(cfg: LoaderConfig, number: int, **options: int) -> dict[tuple[int, int], int]:
    """{(position, sample_id): which} of a rank."""
    loader = Loader(cfg, **options)
    found = {}
    for _ in range(number * loader.steps_per_epoch):
        batch = next(loader)
        which = chosen(batch)
        for position, index in zip(batch.position.tolist(), batch.sample_id.tolist(), strict=True):
            found[position, index] = which[index]
    return found


def test_a_caption_is_drawn_by_seed_and_position_alone(cfg: LoaderConfig) -> None:
    drawn = epochs(replace(cfg, batch_size=5), 3)
    assert len(drawn) == 3 * 50
    for (position, index), which in drawn.items():
        count = len(several_captions(index))
        if count:
            word = words(np.array([position]), 1, seed=5, purpose=Purpose.CAPTION)[0, 0]
            assert which == (int(word) >> 32) * count >> 32
    for changed in (replace(cfg, num_threads=2, prefetch=3), replace(cfg, batch_size=7)):
        other = epochs(changed, 2)
        assert len(other) > 80 and other.items() <= drawn.items()
    other = epochs(replace(cfg, batch_size=5, seed=6), 3)
    assert any(other[key] != drawn[key] for key in other.keys() & drawn.keys())


def test_ranks_choose_independently_of_the_rank(cfg: LoaderConfig) -> None:
    """What a rank reads is drawn as one reader of everything draws it."""
    alone = epochs(replace(cfg, batch_size=5), 3)
    for rank in range(2):
        read = epochs(cfg, 3, rank=rank, num_ranks=2)
        assert len(read) > 60 and read.items() <= alone.items()


def test_every_caption_comes_up_as_often_as_the_others(cfg: LoaderConfig) -> None:
    num_epochs = 60
    drawn = epochs(replace(cfg, batch_size=25), num_epochs)
    for count in (2, 3):
        of_count = {key: k for key, k in drawn.items() if len(several_captions(key[1])) == count}
        hits = Counter(of_count.values())
        law = binom(len(of_count), 1 / count)
        assert hits.keys() == set(range(count))
        assert law.ppf(1e-6) <= min(hits.values()) <= max(hits.values()) <= law.ppf(1 - 1e-6)
        hits_of = Counter((index, which) for (_, index), which in of_count.items())
        law = binom(num_epochs, 1 / count)
        assert law.ppf(1e-8) <= min(hits_of.values()) <= max(hits_of.values()) <= law.ppf(1 - 1e-8)


@pytest.mark.parametrize("position", [0, 5, 12, 30])
def test_resume_is_exact_with_several_captions(cfg: LoaderConfig, position: int) -> None:
    """Before the first batch, in mid-epoch, after an epoch's last batch, and in a later one."""
    original = Loader(cfg)
    take(original, position)
    state = json.loads(json.dumps(original.state_dict()))
    expected = take(original, 15)
    resumed = Loader(replace(cfg, num_threads=2, prefetch=3))
    resumed.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(take(resumed, 15), expected, strict=True))


def test_evaluation_takes_the_first_caption(mixture: Path) -> None:
    found: dict[int, int] = {}
    for batch in evaluation_batches(
        mixture, "train", image_size=4, batch_size=8, representatives_only=True
    ):
        found.update(chosen(batch))
    assert found == {i: 0 if several_captions(i) else -1 for i in range(50)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is seen")
def test_a_gpu_gets_the_captions_of_the_cpu(cfg: LoaderConfig) -> None:
    on_cpu, on_gpu = take(Loader(cfg), 14), take(Loader(cfg, device_id=0), 14)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        for name in ("token_ids", "num_tokens", "label", "sample_id", "group_id"):
            assert getattr(ours, name).device == torch.device("cuda", 0)
            assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))


def test_counts_of_the_manifest(mixture: Path) -> None:
    split = verify(mixture).splits["train"]
    numbers = [len(several_captions(i)) for i in range(50)]
    assert split.num_captions == sum(number > 0 for number in numbers)
    assert split.total_captions == sum(numbers)
    assert split.max_captions == 3
    assert split.num_labels == 33
    raw = json.loads((mixture / "manifest.json").read_text())
    assert raw["format_version"] == 4
    assert raw["splits"]["train"]["total_captions"] == sum(numbers)


@pytest.mark.parametrize("several", [False, True])
def test_batches_without_any_caption_or_label_pass(packer: Packer, several: bool) -> None:
    """Of data without any, and of data where only other batches have some."""
    image = encode_image(smooth_picture(0, 9, 9))
    bare = {"captions": (), "label": -1}
    samples = [sample(i, image, **bare) for i in range(16)]
    if several:
        samples += [sample(i, image, captions=several_captions(3), label=1) for i in range(16, 18)]
    path = packer(samples)
    cfg = LoaderConfig(path=path, batch_size=2, global_views=VIEWS)
    passes = (
        take(Loader(cfg), 9),
        list(evaluation_batches(path, "train", image_size=4, batch_size=2)),
    )
    for batches in passes:
        empty = [batch for batch in batches if batch.sample_id.max() < 16]
        assert len(empty) >= 7
        for batch in empty:
            assert batch.token_ids.tolist() == [[0] * T] * 2
            assert batch.num_tokens.tolist() == [0, 0]
            assert batch.label.tolist() == [-1, -1]
        rest = [batch for batch in batches if batch.sample_id.max() >= 16]
        assert all(batch.num_tokens.max() > 0 and batch.label.max() == 1 for batch in rest)
        assert bool(rest) == several
    split = verify(path).splits["train"]
    assert (split.num_captions, split.total_captions) == ((2, 6) if several else (0, 0))
    assert split.num_labels == (2 if several else 0)


def test_a_split_of_one_caption_beside_one_of_several(tmp_path: Path) -> None:
    from m3i_fast.pipelines.dataset.pack import write_dataset
    from tests.shared.pipelines.data import info

    image = encode_image(smooth_picture(0, 9, 9))
    splits = {
        "train": [sample(i, image, captions=several_captions(3)) for i in range(4)],
        "heldout": [sample(i, image) for i in range(4, 8)],
    }
    path = write_dataset(tmp_path / "data", splits, info(), seed=0, samples_per_shard=4)
    manifest = verify(path)
    assert [s.max_captions for s in manifest.splits.values()] == [1, 3]
    (batch,) = evaluation_batches(path, "heldout", image_size=4, batch_size=4)
    for i, index in enumerate(batch.sample_id.tolist()):
        assert batch.token_ids[i, : batch.num_tokens[i]].tolist() == list(range(1, 4 + index % 5))
