"""Groups of near duplicates are those of all pairs by brute force, whatever runs the pack."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dct
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from m3i_fast.cli import main
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.near_duplicates import (
    HASHED_SIDE,
    NEARER_THAN,
    Clusters,
    hash_pairs,
    perceptual_hash,
)
from m3i_fast.pipelines.packing import near_duplicates
from m3i_fast.pipelines.packing.items import Item
from m3i_fast.pipelines.packing.near_duplicates import HASHED, HashTask, group
from m3i_fast.pipelines.packing.workers import AnyTask, Task, run_here, with_processes
from m3i_fast.report.data.gather import gather
from m3i_fast.report.data.page import render_data_page
from tests.pipelines.packing.helpers import contents, pack_with, put, rows_of
from tests.shared.pipelines.data import smooth_picture

# ---- Hashes --------------------------------------------------------------------------------------


def test_the_hash_is_that_of_frequencies_above_their_median() -> None:
    """The pHash of imagehash: a cosine transform of the whole picture, by scipy in floats."""
    for seed in range(200):
        gray = smooth_picture(seed, HASHED_SIDE, HASHED_SIDE)[..., 0]
        low = dct(dct(gray.astype(np.float64), axis=0), axis=1)[:8, :8].ravel()
        expected = "".join("01"[int(above)] for above in low > np.median(low))
        assert f"{perceptual_hash(gray):064b}" == expected
    assert perceptual_hash(np.full((32, 32), 7, np.uint8)) == 1 << 63  # the mean alone


def hashes_with_neighbours(num: int, seed: int) -> NDArray[np.uint64]:
    """Half of them differ from others in a few bits, some in none."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 2**64, num, np.uint64)
    for i in range(num // 2, num):
        flipped = rng.choice(64, rng.integers(0, 13), replace=False)
        found[i] = found[rng.integers(0, i)] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
    return found


@pytest.mark.parametrize("most_bits", [0, 1, 4, 7, 10])
def test_pairs_of_near_hashes_are_those_of_all_pairs(most_bits: int) -> None:
    hashes = hashes_with_neighbours(600, most_bits)
    apart = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = {(i, j) for i, j in np.argwhere(apart <= most_bits).tolist() if i < j}
    found = {
        (min(pair), max(pair))
        for one, other in hash_pairs(hashes, most_bits)
        for pair in zip(one.tolist(), other.tolist(), strict=True)
    }
    assert found == expected and len(expected) > 10


def test_clusters_are_called_by_their_least() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 500, (400, 2))
    clusters = Clusters()
    for one, other in pairs.tolist():
        clusters.join(one, other)
    graph = np.zeros((500, 500), bool)
    graph[tuple(pairs.T)] = True
    _, oracle = connected_components(graph, directed=False)
    least = [int(np.flatnonzero(oracle == label)[0]) for label in oracle]
    assert [clusters[number] for number in range(500)] == least


# ---- Groups --------------------------------------------------------------------------------------


def some_hashed(num: int, seed: int) -> tuple[list[Item], NDArray[Any]]:
    """Pictures of three splits, some in groups, with copies and with near ones of both kinds."""
    rng = np.random.default_rng(seed)
    hashed = np.zeros(num, HASHED)
    hashed["is_there"] = rng.random(num) < 0.95
    hashed["hash"] = hashes_with_neighbours(num, seed)
    hashed["thumbnail"] = rng.integers(0, 256, (num, 432))
    for i in range(num // 3, num):  # the noise is about as large as what is near
        of = rng.integers(0, i)
        noise = rng.normal(0, rng.choice([0, 10, 12.5, 13, 40]), 432)
        hashed["thumbnail"][i] = (hashed["thumbnail"][of] + noise).clip(0, 255)
        flipped = rng.choice(64, rng.integers(0, 7), replace=False)
        hashed["hash"][i] = int(hashed["hash"][of]) ^ sum(1 << int(bit) for bit in flipped)
    items = [
        Item(
            name=f"{i}.png",
            place=(),
            split=("train", "heldout", "test")[int(rng.integers(0, 3)) if i % 2 else 0],
            group=f"g{rng.integers(0, num // 8)}" if rng.random() < 0.2 else "",
        )
        for i in range(num)
    ]
    return items, hashed


@pytest.mark.parametrize("most_bits", [0, 4, 6])
def test_groups_are_those_of_all_pairs(most_bits: int) -> None:
    items, hashed = some_hashed(500, most_bits)
    there, pixels = hashed["is_there"], hashed["thumbnail"].astype(np.float64) / 255
    near = np.bitwise_count(hashed["hash"][:, None] ^ hashed["hash"]) <= most_bits
    near &= (cdist(pixels, pixels) / 432**0.5 < NEARER_THAN) & there[:, None] & there
    np.fill_diagonal(near, False)
    split, source = (np.array([getattr(i, name) for i in items]) for name in ("split", "group"))
    same_split = split[:, None] == split
    in_source = (source[:, None] == source) & (source != "")
    _, labels = connected_components((near | in_source) & same_split, directed=False)
    has_near = (near & same_split).any(1)
    joined = np.isin(labels, labels[has_near])

    found = group(items, hashed, most_bits)
    members: dict[object, set[int]] = defaultdict(set)
    oracle: dict[object, set[int]] = defaultdict(set)
    for i, item in enumerate(found.items):
        members[(item.split, item.group) if item.group else i].add(i)
        oracle[labels[i]].add(i)
        if not joined[i]:
            assert item == items[i]
    assert sorted(map(sorted, members.values())) == sorted(map(sorted, oracle.values()))
    assert found.num_pictures == joined.sum()
    assert found.num_groups == len(set(labels[joined]))
    assert found.num_elsewhere == (near & ~same_split).any(1).sum() > 3
    assert (in_source & ~same_split).sum() > 50  # which joins none of its splits to another
    names: dict[str, set[str]] = defaultdict(set)
    for i in np.flatnonzero(joined):
        names[found.items[i].group].add(items[i].split)
    assert all(len(splits) == 1 for splits in names.values())
    if most_bits:
        assert 20 < found.num_groups < found.num_pictures < 400


def test_a_group_of_the_source_in_two_splits_joins_none_of_them(tmp_path: Path) -> None:
    """a and b are of it: b alone is refused, which p and q, near a and b, are not."""
    rows = ["image,group,split"]
    for name, seed, group_name, split in (
        ("a", 1, "G", "train"),
        ("b", 2, "G", "val"),
        ("p", 1, "", "train"),
        ("q", 2, "", "val"),
        ("r", 3, "", "val"),
        ("t", 1, "", "test"),
    ):
        quality = 60 if name in "pq" else 90
        put(
            tmp_path,
            f"{name}.jpg",
            encoded(smooth_picture(seed, 120, 160), "JPEG", quality=quality),
        )
        rows.append(f"{name}.jpg,{group_name},{split}")
    table = put(tmp_path, "table.csv", "\n".join(rows).encode())
    hashed: list[str] = []

    def noting(tasks: Sequence[AnyTask], advance: Any) -> Iterator[tuple[AnyTask, Any]]:
        of_pass = [task for task in tasks if isinstance(task, HashTask)]
        hashed.extend(item.name for task in of_pass for item in task.items)
        return run_here(tasks, advance)

    flags = {"group_column": "group", "split_column": "split", "split": ("train", "heldout")}
    packed = pack_with(table, tmp_path / "out", noting, group_near_duplicates=6, **flags)
    assert [refusal.file for refusal in packed.refused] == ["b.jpg"]
    assert "of group 'G' in split heldout" in packed.refused[0].reason
    groups = [[row.group_id for row in rows_of(tmp_path / "out", s)] for s in ("train", "heldout")]
    assert groups == [[0, 0], [3, 4]]
    assert hashed == ["a.jpg", "p.jpg", "q.jpg", "r.jpg"]
    counts = packed.manifest.settings["near_duplicates"]
    assert counts == {"pictures": 2, "groups": 1, "in_another_split": 0}


def test_many_copies_are_compared_once() -> None:
    """All pairs of 40,000 would be 800 million."""
    hashed = np.zeros(40_000, HASHED)
    hashed["is_there"] = True
    items = [Item(name=f"{i}", place=()) for i in range(40_000)]
    assert group(items, hashed, 4)[1:] == (40_000, 1, 0)


# ---- Packing -------------------------------------------------------------------------------------


def encoded(pixels: NDArray[np.uint8], name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


def versions(seed: int) -> list[bytes]:
    """A photograph-like picture: as it is, encoded again, scaled, brighter, and in gray."""
    pixels = smooth_picture(seed, 120, 160)
    image = Image.fromarray(pixels)
    return [
        encoded(pixels, "PNG"),
        encoded(pixels, "JPEG", quality=60),
        encoded(np.asarray(image.resize((320, 240))), "JPEG", quality=90),
        encoded(np.asarray(image.resize((110, 80))), "WEBP", quality=70),
        encoded((pixels * 0.96).astype(np.uint8), "JPEG", quality=85),
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures, each a class; ten of them in five versions, one of these also in val."""
    root = tmp_path_factory.mktemp("pictures") / "source"
    for seed in range(30):
        for i, content in enumerate(versions(seed)[: 5 if seed < 10 else 1]):
            put(root, f"train/{seed:02d}/{i}.jpg", content)
    put(root, "train/00/broken.jpg", b"\xff\xd8\xff no picture")
    put(root, "val/03/x.png", versions(3)[2])
    put(root, "val/29/y.png", versions(50)[0])
    return root


FLAGS: dict[str, Any] = {"group_near_duplicates": 6, "samples_per_shard": 16, "name": "set"}


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    pack_with(source, out, **FLAGS)
    return out


def groups_of(out: Path) -> dict[int, set[int]]:
    """The groups of each class."""
    found: dict[int, set[int]] = defaultdict(set)
    for row in rows_of(out):
        found[row.label].add(row.group_id)
    return found


def test_versions_of_a_picture_are_one_group(undisturbed: Path) -> None:
    groups = groups_of(undisturbed)
    assert len(groups) == 30 and all(len(of_class) == 1 for of_class in groups.values())
    assert len(set.union(*groups.values())) == 30
    settings = read_manifest(undisturbed).settings
    assert settings["near_duplicates"] == {"pictures": 50, "groups": 10, "in_another_split": 6}
    assert settings["pack"]["near_duplicate_bits"] == 6


def test_without_the_flag_each_is_a_group(source: Path, tmp_path: Path) -> None:
    packed = pack_with(source, tmp_path / "out")
    assert packed.manifest.splits["train"].num_groups == 70
    assert "near_duplicates" not in packed.manifest.settings
    assert "near_duplicate_bits" not in packed.manifest.settings["pack"]


def test_a_share_takes_whole_groups(source: Path, tmp_path: Path) -> None:
    packed = pack_with(source / "train", tmp_path / "out", split=("heldout=0.3",), **FLAGS)
    seen = [{row.group_id for row in rows_of(tmp_path / "out", s)} for s in ("train", "heldout")]
    assert packed.manifest.splits["heldout"].num_samples >= 21
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 30


def test_the_bytes_do_not_depend_on_workers_nor_on_kills(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a picture hashed twice."""
    monkeypatch.setattr(near_duplicates, "PICTURES_A_TASK", 20)
    ran: list[Task] = []

    def stopped(tasks: Sequence[AnyTask], advance: Any) -> Iterator[tuple[AnyTask, Any]]:
        for done in run_here(tasks[:2], advance):
            ran.append(done[0])
            yield done
        raise KeyboardInterrupt

    def counted(tasks: Sequence[AnyTask], advance: Any) -> Iterator[tuple[AnyTask, Any]]:
        ran.extend(tasks)
        return with_processes(2)(tasks, advance)

    for run in (stopped, stopped, counted):
        with contextlib.suppress(KeyboardInterrupt):
            pack_with(source, tmp_path / "out", run, **FLAGS)
    assert contents(tmp_path / "out") == contents(undisturbed)
    hashed = [task.number for task in ran if isinstance(task, HashTask)]
    assert sorted(hashed) == [0, 1, 2, 3]


def test_what_was_begun_with_the_flag_is_not_gone_on_with_without_it(
    source: Path, tmp_path: Path
) -> None:
    def stop(tasks: Sequence[AnyTask], advance: Any) -> Iterator[tuple[AnyTask, Any]]:
        yield from run_here(tasks[:0], advance)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_with(source, tmp_path / "out", stop, **FLAGS)
    with pytest.raises(ValueError, match="near_duplicate_bits was 6, is None"):
        pack_with(source, tmp_path / "out", samples_per_shard=16, name="set")
    with pytest.raises(ValueError, match="--group-near-duplicates: expected 0 to 10 bits, got 11"):
        pack_with(source, tmp_path / "other", group_near_duplicates=11)


def test_the_verb_and_the_page_say_how_many(
    source: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--group-near-duplicates 6 --samples-per-shard 16 --name set --workers 1"
    small = "--num-merges 100 --context-length 16"
    main(["data", "pack", str(source), str(tmp_path / "out"), *f"{words} {small}".split()])
    told = " ".join(capsys.readouterr().err.split())
    assert "near duplicates: 50 pictures in 10 groups; 6 have one in another split" in told
    cfg = LoaderConfig(path=undisturbed)
    html = render_data_page(gather(cfg, num_shown=1, num_counted=100, views_of="vit_s"))
    assert "Packing put 50 near duplicates into 10 groups, and left 6 with one in another" in html
