"""Counts and distributions of a data set: of the table for all samples, of the tars for some."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.files import Advance, DatasetFiles
from m3i_fast.pipelines.dataset.manifest import TOKENS_MEMBER, Manifest
from m3i_fast.pipelines.dataset.pictures import FORMATS, stored_size
from m3i_fast.pipelines.dataset.sample_table import BAD, SampleTable
from m3i_fast.pipelines.tar_members import sample_files

SHORT_SIDES = (0, 64, 128, 224, 256, 384, 512, 768, 1024, 2048)  # lower ends of the histogram
UNCUT = 1 << 20  # token ids
QUANTILES = {"least": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1.0}


def describe(
    files: DatasetFiles, name: str, *, read: int, advance: Advance = lambda samples: None
) -> dict[str, Any]:
    """Describe a split by values for JSON.

    read: number of samples, spread evenly, of which the files are read, for sizes of pictures and
    lengths of captions. advance: told each. Raises as `SampleTable.open`, and ValueError for one
    that cannot be read.
    """
    manifest = files.manifest
    table = SampleTable.open(files.folder, manifest, name)
    split = manifest.split(name)
    good = (table.rows["flags"] & BAD) == 0
    sizes = table.rows["size"][good]
    _, of_group = np.unique(table.rows["group_id"][good], return_counts=True)
    chosen = np.flatnonzero(good)
    if read < len(chosen):
        chosen = chosen[np.linspace(0, len(chosen) - 1, read).astype(np.int64)]
    return {
        "samples": split.num_samples,
        "bad": split.num_bad,
        "with_caption": split.num_captions,
        "captions": split.total_captions,
        "with_label": split.num_labels,
        "shards": len(split.shards),
        "bytes": int(sizes.sum(dtype=np.int64)),
        "bytes_a_sample": _spread(sizes),
        "groups": {
            "groups": len(of_group),
            "of_several": int((of_group > 1).sum()),
            "largest": int(of_group.max()),
        },
        "classes": _classes(table.rows["label"][good], manifest.class_names),
        "columns": column_counts(manifest, name),
        "read": _read(files, table, chosen, advance),
    }


def _spread(values: NDArray[Any]) -> dict[str, float]:
    """Return least, median, most and the like; empty for no values."""
    if len(values) == 0:
        return {}
    found = np.quantile(values, list(QUANTILES.values()))
    return {name: round(float(value), 1) for name, value in zip(QUANTILES, found, strict=True)}


def _classes(labels: NDArray[np.int32], names: tuple[str, ...]) -> dict[str, Any]:
    """Return how many classes have pictures, and those with most and least."""
    labels = labels[(labels >= 0) & (labels < len(names))]
    counts = np.bincount(labels, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    ranked = [{"class": names[i], "samples": int(counts[i])} for i in order]
    return {
        "classes": len(names),
        "without_samples": int((counts == 0).sum()),
        "most": ranked[:10],
        "least": ranked[10:][-10:],
    }


def column_counts(manifest: Manifest, name: str) -> list[dict[str, Any]]:
    """Return what each named column is, and of how many samples of a split it is known."""
    info = manifest.split(name).columns
    known = {} if info is None else info.num_known
    return [
        {
            "column": column.name,
            "kind": column.kind,
            "names": len(column.names),
            "known": known[column.name],
        }
        for column in manifest.columns
    ]


def _read(
    files: DatasetFiles, table: SampleTable, chosen: NDArray[np.int64], advance: Advance
) -> dict[str, Any]:
    """Read the files of some samples."""
    manifest = files.manifest
    formats: Counter[str] = Counter()
    shapes: list[tuple[int, int]] = []
    lengths: list[int] = []
    tokenizer = _uncut_tokenizer(manifest)
    rows = table.rows[chosen]
    for row, content in zip(rows, files.samples(table, rows), strict=True):
        try:
            _, parts = sample_files(content)
            image = next(parts[extension] for extension in FORMATS if extension in parts)
            found, *shape = stored_size(_reader(image))
            lengths += _caption_lengths(parts, manifest, tokenizer)
        except (ValueError, StopIteration) as error:
            file = files.name(table.shard_files[row["shard"]])
            raise ValueError(
                f"{file}: sample {row['sample_id']}: {error or 'no picture'}; list all that is "
                "wrong by: m3i-fast data verify"
            ) from None
        formats[found] += 1
        shapes.append((shape[0], shape[1]))
        advance(1)
    sides = np.array(shapes)
    limit = manifest.tokenizer.context_length
    # Packed ids are cut already: how many were, the packer has recorded for all splits together.
    recorded = None if tokenizer else manifest.settings.get("captions_cut")
    recorded = recorded if type(recorded) is int else None
    return {
        "samples": len(chosen),
        "formats": dict(formats),
        "height": _spread(sides[:, 0]),
        "width": _spread(sides[:, 1]),
        "short_side": _histogram(sides.min(1)),
        "caption_tokens": _spread(np.array(lengths)),
        "captions": len(lengths),
        "captions_cut": sum(length > limit for length in lengths) if tokenizer else None,
        "captions_cut_of_all_splits": recorded,
        "captions_full": sum(length >= limit for length in lengths),
        "context_length": limit,
    }


def _reader(image: bytes) -> Any:
    return lambda offset, count: image[offset : offset + count]


def _histogram(values: NDArray[np.int64]) -> list[dict[str, int]]:
    """Count values from each lower end up to the next."""
    place = np.searchsorted(SHORT_SIDES, values, side="right") - 1
    counts = np.bincount(place, minlength=len(SHORT_SIDES))
    return [
        {"from": low, "samples": int(count)}
        for low, count in zip(SHORT_SIDES, counts, strict=True)
        if count
    ]


def _uncut_tokenizer(manifest: Manifest) -> Tokenizer | None:
    """Return the tokenizer of captions that are text, without its limit."""
    if manifest.caption_member == TOKENS_MEMBER:
        return None
    return Tokenizer(manifest.tokenizer.num_merges, UNCUT)


def _caption_lengths(
    files: dict[str, bytes], manifest: Manifest, tokenizer: Tokenizer | None
) -> list[int]:
    """Return the number of token ids of each caption of a sample."""
    if tokenizer is None:
        if captions.LENGTHS in files:
            return [int(n) for n in np.frombuffer(files[captions.LENGTHS], "<i4")]
        return [len(files[captions.TOKENS]) // 4] if captions.TOKENS in files else []
    kind, _, field = manifest.caption_member.partition(":")
    text = files.get(kind, b"").decode()
    if text and field:
        value = json.loads(text)
        text = str((value.get(field) if isinstance(value, dict) else None) or "")
    return [len(tokenizer.encode(text.strip()))] if text.strip() else []
