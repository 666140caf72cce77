"""Inputs of a data set's page, gathered through the loader and the evaluation's reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from m3i_fast.config.data import LoaderConfig
from m3i_fast.evaluation.chosen_rows import choose_rows
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo, Values
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import REFUSED_NAME, Manifest
from m3i_fast.pipelines.dataset.near_duplicates import (
    COMPARED_SIZE,
    NEARER_THAN,
    Thumbnails,
    distances,
    thumbnail,
)
from m3i_fast.pipelines.dataset.pictures import FORMATS, decode_pixels
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.inspection.statistics import column_counts
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from m3i_fast.pipelines.opened.open_data import OpenSplit
from m3i_fast.pipelines.opened.open_few import open_few
from m3i_fast.pipelines.storage.objects import Bucket, url_of
from m3i_fast.pipelines.storage.remote import manifest_at
from m3i_fast.pipelines.tar_members import sample_files
from m3i_fast.report.data.inputs import (
    Counted,
    DataPageInputs,
    NearPair,
    Refusal,
)
from m3i_fast.report.data.regions import ShownRegions
from m3i_fast.report.inputs import Picture, ShownSample, ShownView

MOST_SIDE = 360  # pixels of a picture on the page
NUM_PAIRS = 12
_AT_ONCE = 32  # samples whose views are in memory together
_ROWS_A_BLOCK = 512  # bounds the memory of the [block, N] distances


def gather(
    cfg: LoaderConfig,
    *,
    num_shown: int,
    num_counted: int,
    views_of: str,
    tell: Callable[[int, int], object] = lambda done, total: None,
) -> DataPageInputs:
    """Gather the page of the split `cfg.split` of the data set at `cfg.path`.

    num_shown: samples with their views, as cfg says. num_counted: pictures of each split, from
    all over it, that histograms and the search for near duplicates read. tell: called with the
    number of these that are read, and of all. Raises as `Loader`, and ValueError where
    refused.jsonl is damaged.
    """
    manifest = manifest_at(cfg)
    split = manifest.split(cfg.split)
    total = sum(min(num_counted, each.num_samples) for each in manifest.splits.values())
    read: dict[str, _Read] = {}
    for name in manifest.splits:
        before = sum(len(found.sample_id) for found in read.values())
        read[name] = _Read(cfg, name, num_counted, partial(_tell, tell, before, total))
    in_group, between, near = _near_pairs(cfg, read)
    return DataPageInputs(
        name=manifest.name,
        split=cfg.split,
        num_samples=split.num_samples,
        num_captions=split.num_captions,
        num_labels=split.num_labels,
        num_groups=split.num_groups,
        class_names=manifest.class_names,
        context_length=manifest.tokenizer.context_length,
        counted=read[cfg.split].counted(),
        samples=list(_samples(cfg, manifest, min(num_shown, split.num_samples))),
        views_of=views_of,
        views_config=_views_config(cfg),
        compared={name: len(found.sample_id) for name, found in read.items()},
        num_near=between,
        num_near_in_group=in_group,
        near=near,
        refused=_refused(cfg.path),
        attribution=manifest.attribution,
        columns=column_counts(manifest, cfg.split),
        near_grouped=manifest.settings.get("near_duplicates"),
    )


def _tell(tell: Callable[[int, int], object], before: int, total: int, number: int) -> None:
    tell(before + number, total)


class _Read:
    """Pictures of a split: annotations, sizes and thumbnails of their centre squares."""

    def __init__(
        self, cfg: LoaderConfig, split: str, most: int, tell: Callable[[int], object]
    ) -> None:
        labels: list[int] = []
        tokens: list[int] = []
        sizes: list[tuple[int, int]] = []
        self.sample_id: list[int] = []
        self.group_id: list[int] = []
        thumbnails: list[Thumbnails] = []
        chosen = choose_rows(replace(cfg, split=split), most, representatives_only=False)
        batches = evaluation_batches(
            cfg.path,
            split,
            image_size=COMPARED_SIZE,
            batch_size=min(64, most),
            num_threads=len(os.sched_getaffinity(0)),
            bucket_fields_of=cfg,
            rows=chosen.rows,
        )
        for batch in batches:
            labels += batch.label.tolist()
            tokens += batch.num_tokens.tolist()
            sizes += [(int(h), int(w)) for h, w in batch.image_size.tolist()]
            self.sample_id += batch.sample_id.tolist()
            self.group_id += batch.group_id.tolist()
            thumbnails += [thumbnail(_picture(view)) for view in batch.global_views[0]]
            tell(len(labels))
        self.thumbnails: Thumbnails = np.stack(thumbnails)
        self._labels, self._tokens, self._sizes = labels, tokens, sizes

    def counted(self) -> Counted:
        return Counted(labels=self._labels, num_tokens=self._tokens, sizes=self._sizes)


def _samples(cfg: LoaderConfig, manifest: Manifest, number: int) -> Iterator[ShownSample]:
    """Yield samples of the first epoch as training gets them."""
    opened = open_few(cfg)
    loader = Loader(replace(cfg, batch_size=min(number, _AT_ONCE)), opened=opened)
    try:
        yield from _shown(cfg, manifest, number, loader, opened)
    finally:
        loader.close()


def _shown(
    cfg: LoaderConfig, manifest: Manifest, number: int, loader: Loader, opened: OpenSplit
) -> Iterator[ShownSample]:
    """Yield the first samples of a loader; their pictures are read from what it has opened."""
    shown: set[int] = set()
    for batch in loader:
        ids = batch.sample_id.tolist()
        rows = [row for row, sample_id in enumerate(ids) if sample_id not in shown]
        rows = rows[: number - len(shown)]
        if not rows:  # all of an epoch, or as many as asked for
            break
        shown |= {ids[row] for row in rows}
        yield from samples_of(cfg, manifest, batch, rows, opened)


def samples_of(
    cfg: LoaderConfig, manifest: Manifest, batch: Batch, rows: Sequence[int], opened: OpenSplit
) -> list[ShownSample]:
    """Return some rows of a training batch of a data set, with their pictures."""
    tokenizer = Tokenizer.from_info(manifest.tokenizer)
    names = [*manifest.class_names, ""]  # label -1 has no name
    has_alternates = cfg.alternates and manifest.split(cfg.split).max_alternates > 0
    ids, sizes = batch.sample_id.tolist(), batch.image_size.tolist()
    pictures = pictures_of(opened, [ids[row] for row in rows], cfg.max_pixels)
    regions = ShownRegions(manifest, opened, tokenizer)
    columns = _columns(opened, [ids[row] for row in rows])
    return [
        ShownSample(
            picture=pictures[ids[row]],
            size=(int(sizes[row][0]), int(sizes[row][1])),
            sample_id=ids[row],
            group_id=int(batch.group_id[row]),
            caption=_caption(tokenizer, batch, row),
            category=names[int(batch.label[row])],
            columns=[
                (column.name, shown_value(column, columns[column.name][number], tokenizer))
                for column in manifest.columns
                if column.kind != "regions"  # they are drawn
            ],
            views=_views(batch, row, has_alternates, regions),
            regions=regions.of_picture(ids[row]),
        )
        for number, row in enumerate(rows)
    ]


def _columns(opened: OpenSplit, sample_ids: Sequence[int]) -> Values:
    """Return the values of the columns of samples, a row each."""
    table = opened.table
    assert isinstance(table, SampleTable)  # one data set
    if table.columns is None:
        return {}
    stored = table.rows["sample_id"]
    found = np.flatnonzero(np.isin(stored, sample_ids))  # the table may be long: once for all
    number_of = dict(zip(stored[found].tolist(), found.tolist(), strict=True))
    return table.columns_at(np.array([number_of[sample_id] for sample_id in sample_ids]))


def shown_value(column: ColumnInfo, row: npt.NDArray[Any], tokenizer: Tokenizer) -> str:
    """Return what a row of a column says, in words; empty where nothing is known."""
    value = column.value(row)
    if value is None:
        return ""
    match column.kind:
        case "class":
            return column.names[value]
        case "labels":
            return ", ".join(column.names[label] for label in value) or "none of them"
        case "numbers":
            told = ["not known" if each is None else f"{each:.7g}" for each in value]
            return ", ".join(
                f"{name} {text}" for name, text in zip(column.names, told, strict=True)
            )
    return tokenizer.decode(np.array(value, np.int32))


def _caption(tokenizer: Tokenizer, batch: Batch, row: int) -> str:
    number = int(batch.num_tokens[row])
    return tokenizer.decode(batch.token_ids[row, :number].numpy()) if number else ""


def _views(batch: Batch, row: int, has_alternates: bool, regions: ShownRegions) -> list[ShownView]:
    views = [*batch.global_views, *batch.local_views]
    return [
        ShownView(
            picture=_picture(view[row]),
            y=y,
            x=x,
            height=height,
            width=width,
            is_mirrored=bool(flip),
            is_local=i >= len(batch.global_views),
            is_of_alternate=has_alternates and i == 1 < len(batch.global_views),
            regions=regions.of_view(batch, row, i),
        )
        for i, (view, (y, x, height, width, flip)) in enumerate(
            zip(views, batch.boxes[row].tolist(), strict=True)
        )
    ]


def _picture(view: Any) -> Picture:  # [3, S, S] uint8 tensor -> [S, S, 3]
    return np.ascontiguousarray(view.permute(1, 2, 0).numpy())


def pictures_of(opened: OpenSplit, ids: Collection[int], max_pixels: int) -> dict[int, Picture]:
    """Read and decode the upright pictures of some samples, at most MOST_SIDE pixels long."""
    table, shards = opened.table, opened.shards
    assert isinstance(table, SampleTable)  # one data set
    found = {}
    numbers = np.flatnonzero(np.isin(table.rows["sample_id"], list(ids)))
    places = shards.locate(table, numbers)
    for row, (file, offset) in zip(table.at(numbers), places, strict=True):
        with Path(file).open("rb") as tar:
            content = os.pread(tar.fileno(), int(row["size"]), offset)
        _, files = sample_files(content)
        encoded = next(files[name] for name in FORMATS if name in files)
        found[int(row["sample_id"])] = _decode(encoded, max_pixels)
    return found


def _decode(encoded: bytes, max_pixels: int) -> Picture:
    upright = Image.fromarray(decode_pixels(encoded, max_pixels))
    upright.thumbnail((MOST_SIDE, MOST_SIDE))
    return np.asarray(upright)


# ---- Near duplicates -----------------------------------------------------------------------------


def _near_pairs(cfg: LoaderConfig, read: Mapping[str, _Read]) -> tuple[int, int, list[NearPair]]:
    """Count near pairs in one group and in different ones; returns both and some of the latter.

    Pairs of two splits come first, then the nearest; each picture is in one pair at most.
    """
    rows = [(name, i) for name, found in read.items() for i in range(len(found.sample_id))]
    thumbnails = np.concatenate([found.thumbnails for found in read.values()])
    group = np.concatenate([np.array(found.group_id) for found in read.values()])
    split = np.concatenate([np.full(len(f.sample_id), i) for i, f in enumerate(read.values())])
    in_group, between, best = _search(thumbnails, group, split)
    taken: set[int] = set()
    chosen: list[tuple[float, tuple[str, int], tuple[str, int]]] = []
    for _, distance, one, other in best:
        if len(chosen) < NUM_PAIRS and not taken & {one, other}:
            taken |= {one, other}
            chosen.append((distance, rows[one], rows[other]))
    ids = {
        name: [read[name].sample_id[i] for _, *two in chosen for n, i in two if n == name]
        for name in read
    }
    pictures = {
        name: _pictures_of_split(replace(cfg, split=name), of) for name, of in ids.items() if of
    }
    pairs = []
    for distance, (split_a, a), (split_b, b) in chosen:
        id_a, id_b = read[split_a].sample_id[a], read[split_b].sample_id[b]
        pairs.append(
            NearPair(
                pictures=(pictures[split_a][id_a], pictures[split_b][id_b]),
                sample_ids=(id_a, id_b),
                splits=(split_a, split_b),
                distance=distance,
            )
        )
    return in_group, between, pairs


def _pictures_of_split(cfg: LoaderConfig, ids: Collection[int]) -> dict[int, Picture]:
    opened = open_few(cfg)
    try:
        return pictures_of(opened, ids, cfg.max_pixels)
    finally:
        opened.shards.close()


def _search(
    thumbnails: Thumbnails,  # [N, D]
    group: npt.NDArray[np.int64],  # [N]
    split: npt.NDArray[np.int64],  # [N]
) -> tuple[int, int, list[tuple[int, float, int, int]]]:
    """Return near pairs in one group, in different ones, and the first of the latter.

    Those are (0 for two splits or 1 for one, distance, row, row), in this order.
    """
    in_group = between = 0
    best: list[tuple[int, float, int, int]] = []
    for start in range(0, len(thumbnails), _ROWS_A_BLOCK):
        block = slice(start, start + _ROWS_A_BLOCK)
        distance = distances(thumbnails[block], thumbnails[start:])
        distance[np.tril_indices(len(distance), m=distance.shape[1])] = np.inf
        near = distance < NEARER_THAN
        same = near & (group[block, None] == group[None, start:])
        near &= ~same
        in_group, between = in_group + int(same.sum()), between + int(near.sum())
        one, other = np.nonzero(near)
        apart = split[one + start] == split[other + start]
        order = np.lexsort((distance[one, other], apart))[: 50 * NUM_PAIRS]
        best += [
            (
                int(apart[i]),
                float(distance[one[i], other[i]]),
                int(one[i]) + start,
                int(other[i]) + start,
            )
            for i in order
        ]
    return in_group, between, sorted(best)


# ---- What was refused, and settings --------------------------------------------------------------


def _refused(path: Path) -> list[Refusal] | None:
    """Read what packing or indexing left out; None where no file says so."""
    url = url_of(path)
    file = f"{url or path}/{REFUSED_NAME}"
    try:
        content = Bucket(url).read(REFUSED_NAME) if url else Path(file).read_bytes()
    except FileNotFoundError:
        return None
    rows = []
    text = content.decode("utf-8", errors="surrogateescape")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            name = [str(row["file"]), *([str(row["sample"])] if row.get("sample") else [])]
            advice = str(row.get("what_to_do", ""))
            rows.append(Refusal(": ".join(name), str(row["reason"]), advice))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file}: line {number}: expected an object with file and reason, got {line[:80]!r}"
            ) from error
    return rows


def _views_config(cfg: LoaderConfig) -> dict[str, Any]:
    """Return the fields of the views by their flags' names."""
    views = {"global_views": cfg.global_views, "local_views": cfg.local_views}
    return {
        f"{group}.{field}": value
        for group, view in views.items()
        if view is not None
        for field, value in asdict(view).items()
    }
