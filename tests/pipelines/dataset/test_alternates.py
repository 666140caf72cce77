"""Other pictures of the same thing: which one the second view shows, when, and damaged ones."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    EVERYTHING,
    Components,
    before_tables,
    edit_manifest,
    encode_image,
    equal,
    pack,
    repack,
    sample,
    take,
)

PLAIN = ViewConfig(size=4, jitter_probability=0, gray_probability=0)
NUM = 24


def flat(*colour: int, side: int = 8) -> bytes:
    return encode_image(np.full((side, side, 3), colour, dtype=np.uint8))


def own(index: int) -> bytes:
    return flat(10 * index, 0, 0)


def others(index: int) -> tuple[bytes, ...]:
    """One to four other pictures: blue, and green tells which."""
    return tuple(flat(10 * index, 60 * k, 200) for k in range(1 + index % 4))


def samples(**changes: object) -> list[Sample]:
    return [sample(i, own(i), **{"alternates": others(i), **changes}) for i in range(NUM)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("alternates") / "data", samples(), samples_per_shard=6)


@pytest.fixture
def cfg(path: Path) -> LoaderConfig:
    return LoaderConfig(path=path, batch_size=4, global_views=PLAIN, seed=5)


def shown(batch: Batch, view: int) -> list[tuple[int, int, int]]:
    """The one colour of each picture of a global view."""
    pixels = batch.global_views[view].numpy().reshape(batch.batch_size, 3, -1)
    assert (pixels == pixels[..., :1]).all()
    return [tuple(int(c) for c in row) for row in pixels[..., 0]]  # type: ignore[misc]


def test_the_second_view_shows_another_picture_each_as_often(cfg: LoaderConfig) -> None:
    local = replace(PLAIN, size=2, count=1)
    loader = Loader(replace(cfg, local_views=local, global_views=replace(PLAIN, count=3)))
    assert loader.manifest.format_version == 4
    number = 60
    drawn: dict[int, Counter[int]] = defaultdict(Counter)
    for batch in take(loader, number * loader.steps_per_epoch):
        for row, index in enumerate(batch.sample_id.tolist()):
            red = 10 * index
            assert shown(batch, 0)[row] == shown(batch, 2)[row] == (red, 0, 0)
            assert batch.local_views[0][row, :, 0, 0].tolist() == [red, 0, 0]
            second = shown(batch, 1)[row]
            assert (second[0], second[2]) == (red, 200) and second[1] % 60 == 0
            drawn[index][second[1] // 60] += 1
    for index, counts in drawn.items():
        assert counts.keys() == set(range(1 + index % 4)), counts
        low, high = binom.interval(1 - 1e-6, number, 1 / len(counts))
        assert all(low <= count <= high for count in counts.values()), counts


def test_a_resume_draws_the_same_ones(cfg: LoaderConfig) -> None:
    cfg = replace(cfg, global_views=EVERYTHING)
    loader = Loader(cfg)
    take(loader, 8)
    state = loader.state_dict()
    expected = take(loader, 12)
    again = Loader(cfg)
    again.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(expected, take(again, 12), strict=True))


@pytest.mark.parametrize(
    "change", [{"alternates": False}, {"global_views": replace(PLAIN, count=1)}]
)
def test_where_they_are_not_asked_for_all_views_are_of_the_first(
    cfg: LoaderConfig, change: dict[str, object], tmp_path: Path
) -> None:
    loader = Loader(replace(cfg, **change))  # type: ignore[arg-type]
    for batch in take(loader, loader.steps_per_epoch):
        for view in range(len(batch.global_views)):
            assert shown(batch, view) == [(10 * i, 0, 0) for i in batch.sample_id.tolist()]
    without = pack(tmp_path / "without", samples(alternates=()), samples_per_shard=6)
    plain = Loader(replace(cfg, path=without, **change))  # type: ignore[arg-type]
    for ours, theirs in zip(take(plain, 3), take(Loader(loader.cfg), 3), strict=True):
        assert equal(ours, theirs)


def test_evaluation_sees_the_first(path: Path) -> None:
    for batch in evaluation_batches(path, "train", image_size=4, batch_size=5):
        assert shown(batch, 0) == [(10 * i, 0, 0) for i in batch.sample_id.tolist()]


def test_what_is_stored_is_read_again() -> None:
    stored = dict(alternates.components(others(3)))
    assert tuple(alternates.split(stored["alt"], stored["aln"])) == others(3)
    assert alternates.count({name: len(content) for name, content in stored.items()}) == 4
    assert not list(alternates.components(()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (flat(1, 2, 3, side=9), "another picture of it: expected 8 x 8 pixels.*got 9 x 9"),
        (encode_image(np.zeros((8, 8, 3), np.uint8), "JPEG"), "expected png, got JPEG data"),
        (own(1)[:-20], "corrupt or empty image"),
        (b"", "corrupt or empty image"),
    ],
    ids=["size", "format", "damaged", "empty"],
)
def test_the_packer_refuses_by_name(tmp_path: Path, wrong: bytes, message: str) -> None:
    bad = sample(7, own(7), alternates=(own(7), wrong))
    with pytest.raises(ValueError, match=f"sample picture-7: .*{message}"):
        pack(tmp_path / "data", [bad])


def test_all_samples_of_a_split_have_some_or_none_has(tmp_path: Path) -> None:
    mixed = [*samples()[:3], sample(3, own(3))]
    with pytest.raises(ValueError, match="of every sample or of none, got none of 1 of 4"):
        pack(tmp_path / "data", mixed)


def bomb() -> bytes:
    """A PNG whose header says 60,000 x 60,000."""
    header = bytearray(own(0))
    header[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(header)


def put(*pictures: bytes) -> Components:
    return dict(alternates.components(pictures))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found | {"aln": b"\1\0\0\0"}, r"picture-2.alt: expected int32 sizes .* 1"),
        (lambda found: found | {"aln": b"\1\0"}, "picture-2.alt: .* got 2 bytes"),
        (lambda found: found | put(bomb()), "picture-2.alt: expected at most .* 60000 x 60000"),
        (lambda found: found | put(b"x" * 99), "picture-2.alt: corrupt or empty image"),
        (
            lambda found: {name: c for name, c in found.items() if name != "aln"},
            "expected alt and aln or neither",
        ),
        (
            lambda found: {name: c for name, c in found.items() if name not in ("alt", "aln")},
            r"expected 1 to 3 other pictures a sample \(manifest\), got 0 of one",
        ),
        (lambda found: found | put(*[own(2)] * 4), "expected 1 to 3 other pictures .* got 4"),
    ],
)
def test_shards_that_would_mislead_the_reader_are_refused_on_opening(
    tmp_path: Path, change: Callable[[Components], Components], message: str
) -> None:
    out = pack(tmp_path / "data", samples()[:3])
    repack(out, lambda index, found: change(found) if index == 2 else found)
    for opened in (lambda: Loader(LoaderConfig(path=out, batch_size=1)), lambda: verify(out)):
        with pytest.raises(ValueError, match=message):
            opened()


def test_a_manifest_that_counts_wrongly_is_refused(tmp_path: Path) -> None:
    out = pack(tmp_path / "data", samples()[:3])
    edit_manifest(out, lambda raw: raw["splits"]["train"].update(max_alternates=9))
    with pytest.raises(ValueError, match="expected max_alternates 9 .manifest., got 3"):
        verify(out)


@pytest.mark.parametrize("damage", ["pixels", "size"])
def test_a_damaged_one_is_named(tmp_path: Path, damage: str) -> None:
    """By verify --decode, and where training stops at it."""
    bad = own(2)[:60] + b"\0" * 4 + own(2)[64:] if damage == "pixels" else flat(1, 1, 1, side=9)
    out = pack(tmp_path / "data", samples()[:3])
    repack(out, lambda index, found: found | put(bad) if index == 2 else found)
    edit_manifest(out, lambda raw: raw["splits"]["train"].update(max_alternates=2))
    with pytest.raises(ValueError, match=r"picture-2.alt \("):
        verify(out, decode=True)
    if damage == "pixels":
        loader = Loader(LoaderConfig(path=out, batch_size=3, global_views=PLAIN, strict=True))
        with pytest.raises(
            RuntimeError, match=r"corrupt sample 2 at position \d in .*verify --decode"
        ):
            take(loader, 3)


def test_formats_before_have_none(path: Path, tmp_path: Path) -> None:
    out = before_tables(pack(tmp_path / "data", samples(alternates=())[:3]))
    raw = (out / "manifest.json").read_text()
    assert "max_alternates" not in raw and re.search(r'"format_version": 1\b', raw)
    assert verify(out).splits["train"].max_alternates == 0
