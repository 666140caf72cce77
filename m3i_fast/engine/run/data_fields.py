"""Fields of a config that the data decide: classes, token ids, tokens, columns, terms that are on.

A recipe's values stand for the data set it was written for, so that its cost can be planned without
one. A verb that reads the data takes what their manifest says instead. Loads no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.flags import flag_of
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo, ColumnsInfo, pooled
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, Manifest
from m3i_fast.pipelines.opened.mixture import MixedData, read_described
from m3i_fast.pipelines.storage.objects import place_of

logger = logging.getLogger(__name__)

Described = Manifest | MixedData

_SAID_BY: dict[str, Callable[[Described], int]] = {
    "num_classes": lambda data: len(data.class_names),
    "text.vocab_size": lambda data: data.tokenizer.vocab_size,
    "text.context_length": lambda data: data.tokenizer.context_length,
}


def take_data_fields(cfg: TrainConfig, typed: Collection[str] = ()) -> TrainConfig:
    """Return the config with what the manifests of the data it names decide, and log the values.

    A term of classes or captions gets the weight 0 if no picture has any.

    typed: the flags that a person gave, as `typed_flags` returns them. Raises ValueError for those
    of them that contradict the manifest and if no term is left, and as `read_described`.
    """
    file = _source(cfg)
    try:
        manifest = read_described(cfg.data)
    except FileNotFoundError as error:
        flag = "--data.mixture" if cfg.data.mixture else "--data.path"
        raise FileNotFoundError(f"{flag}: {error}") from None
    refused = [
        f"{flag_of(name)}: expected {expected} as {file} says, got {got}: leave the flag out, and "
        "it is taken from the data"
        for name, (got, expected) in _differences(cfg, manifest).items()
        if flag_of(name) in typed
    ]
    if refused:
        raise ValueError("; ".join(refused))
    absent = _absent(cfg, manifest)
    terms = tuple(replace(t, weight=0.0) if t.name in absent else t for t in cfg.objective.terms)
    left = [term.name for term in terms if term.weight > 0]
    if not left:
        raise ValueError(
            f"objective.terms: expected data with {' or '.join(sorted(set(absent.values())))} for "
            f"{', '.join(absent)}, got none in {file}: pack the data with them, or train another "
            "recipe"
        )
    columns = columns_of(cfg, manifest)
    _expect_columns(cfg, columns, file)
    logger.info("from %s: %s", file, _told(cfg, manifest))
    off = [
        f"{term.name} ({f'no {absent[term.name]}' if term.name in absent else 'weight 0'})"
        for term in terms
        if term.name not in left
    ]
    logger.info("terms: %s", ", ".join(left) + (f"; off: {', '.join(off)}" if off else ""))
    tokenizer = manifest.tokenizer
    try:
        text = replace(
            cfg.text,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
        )
        return replace(
            cfg,
            num_classes=len(manifest.class_names),
            columns=columns,
            text=text,
            objective=replace(cfg.objective, terms=terms),
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def expect_data(cfg: TrainConfig, manifest: Described) -> None:
    """Raise ValueError, which names every field, where the model does not fit the data.

    manifest: what the loader reads; that of one data set does not stand for a mixture.
    """
    file = _source(cfg)
    if cfg.data.mixture and not isinstance(manifest, MixedData):
        raise ValueError(
            f"data.mixture: expected a loader of {len(cfg.data.mixture)} data sets, got one of "
            f"{manifest.name!r} alone"
        )
    wrong = [
        f"{name}: expected {expected} as {file} says, got {got}"
        for name, (got, expected) in _differences(cfg, manifest).items()
    ]
    if wrong:
        raise ValueError("; ".join(wrong) + " (take_data_fields takes them from the data)")
    if (columns := columns_of(cfg, manifest)) != cfg.columns:
        raise ValueError(
            f"columns: expected {_names(columns)} with sizes and statistics as {file} says, got "
            f"{_names(cfg.columns)} (take_data_fields takes them from the data)"
        )


def num_captioned(cfg: TrainConfig, described: Described) -> int:
    """Return how many pictures of the data that a run of `cfg` reads have a caption."""
    return sum(
        manifest.split(split).num_captions for manifest, split in used_splits(cfg, described)
    )


def used_splits(cfg: TrainConfig, described: Described) -> list[tuple[Manifest, str]]:
    """Return the manifest of each data set that a run of `cfg` reads, with the split of it."""
    if isinstance(described, MixedData):
        pairs = zip(described.parts, described.manifests, strict=True)
        return [(manifest, part.split) for part, manifest in pairs]
    return [(described, cfg.data.split)]


def columns_of(cfg: TrainConfig, data: Described) -> tuple[ColumnConfig, ...]:
    """Return the named columns of the data, with statistics of the splits that a config reads."""
    if isinstance(data, MixedData):
        pairs = zip(data.parts, data.manifests, strict=True)
        found = [manifest.split(part.split).columns for part, manifest in pairs]
    else:
        found = [data.split(cfg.data.split).columns]
    of_splits = [info for info in found if info is not None]
    return tuple(_column(column, of_splits) for column in data.columns)


def _column(column: ColumnInfo, of_splits: Sequence[ColumnsInfo]) -> ColumnConfig:
    mean, std = pooled(column, of_splits) if column.kind == "numbers" else ((), ())
    return ColumnConfig(
        name=column.name,
        kind=column.kind,
        num_names=len(column.names),
        size=column.size,
        mean=mean,
        std=std,
    )


def _expect_columns(cfg: TrainConfig, columns: Sequence[ColumnConfig], file: str) -> None:
    """Raise ValueError for a term that names a column which the data do not have."""
    there = {column.name: column.kind for column in columns}
    for term in cfg.objective.terms:
        if term.weight > 0 and term.column and there.get(term.column) != term.kind.column:
            raise ValueError(
                f"term {term.name!r}: expected a column {term.column!r} of {term.kind.column}, got "
                f"{_names(columns)} in {file}: name another by "
                f"--objective.terms.{term.name}.column, or pack one by m3i-fast data pack "
                f"--column NAME:{term.kind.column}"
            )


def _names(columns: Sequence[ColumnConfig]) -> str:
    return ", ".join(f"{c.name} ({c.kind})" for c in columns) or "no columns"


def _source(cfg: TrainConfig) -> str:
    """Return the manifests of the data that a config names."""
    parts = cfg.data.mixture_parts
    paths = [part.path for part in parts] if parts else [cfg.data.path]
    return " and ".join(f"{place_of(path)}/{MANIFEST_NAME}" for path in paths)


def _differences(cfg: TrainConfig, manifest: Described) -> dict[str, tuple[float, float]]:
    """Return (the config's value, the data's) of every field in which they differ."""
    pairs: dict[str, tuple[float, float]] = {
        name: (_value(cfg, name), said(manifest)) for name, said in _SAID_BY.items()
    }
    weights = {term.name: term.weight for term in cfg.objective.terms}
    for name in _absent(cfg, manifest):
        pairs[f"objective.terms.{name}.weight"] = weights[name], 0
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _absent(cfg: TrainConfig, data: Described) -> dict[str, str]:
    """Return what no picture of the data has, classes or captions, by the terms that predict it."""
    num_labels = sum(manifest.split(split).num_labels for manifest, split in used_splits(cfg, data))
    there = {"class": num_labels, "text": num_captioned(cfg, data)}
    return {
        term.name: {"class": "classes", "text": "captions"}[term.kind.column]
        for term in cfg.objective.active_terms
        if term.kind.has_default and not term.column and not there[term.kind.column]
    }


def _told(cfg: TrainConfig, manifest: Described) -> str:
    """Say each value, and the one of the config whose place it takes."""
    changed = _differences(cfg, manifest)
    return ", ".join(
        f"{name} {said(manifest)}"
        + (f" (in place of {changed[name][0]})" if name in changed else "")
        for name, said in _SAID_BY.items()
    )


def _value(cfg: TrainConfig, name: str) -> int:
    section, _, field = name.rpartition(".")
    value: int = getattr(getattr(cfg, section) if section else cfg, field)
    return value
