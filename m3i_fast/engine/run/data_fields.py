"""Fields of a config that the data decide: how many classes, token ids and tokens there are.

A recipe's values stand for the data set it was written for, so that its cost can be planned without
one. A verb that reads the data takes what their manifest says instead. Loads no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from m3i_fast.config.train import TrainConfig
from m3i_fast.flags import flag_of
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, Manifest
from m3i_fast.pipelines.storage.remote import manifest_at

logger = logging.getLogger(__name__)

_SAID_BY: dict[str, Callable[[Manifest], int]] = {
    "num_classes": lambda manifest: len(manifest.class_names),
    "text.vocab_size": lambda manifest: manifest.tokenizer.vocab_size,
    "text.context_length": lambda manifest: manifest.tokenizer.context_length,
}


def take_data_fields(cfg: TrainConfig, typed: Collection[str] = ()) -> TrainConfig:
    """Return the config with what the manifest of the data it names decides, and log the values.

    typed: the flags that a person gave, as `typed_flags` returns them. Raises ValueError for those
    of them that contradict the manifest and for terms that need classes where there are none, and
    as `read_manifest`.
    """
    file, manifest = cfg.data.path / MANIFEST_NAME, manifest_at(cfg.data)
    refused = [
        f"{flag_of(name)}: expected {expected} as {file} says, got {got}: leave the flag out, and "
        "it is taken from the data"
        for name, (got, expected) in _differences(cfg, manifest).items()
        if flag_of(name) in typed
    ]
    if refused:
        raise ValueError("; ".join(refused))
    _expect_classes(cfg, manifest, file)
    logger.info("from %s: %s", file, _told(cfg, manifest))
    tokenizer = manifest.tokenizer
    try:
        text = replace(
            cfg.text,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
        )
        return replace(cfg, num_classes=len(manifest.class_names), text=text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def expect_data(cfg: TrainConfig, manifest: Manifest) -> None:
    """Raise ValueError, which names every field, where the model does not fit the data."""
    file = cfg.data.path / MANIFEST_NAME
    wrong = [
        f"{name}: expected {expected} as {file} says, got {got}"
        for name, (got, expected) in _differences(cfg, manifest).items()
    ]
    if wrong:
        raise ValueError("; ".join(wrong) + " (take_data_fields takes them from the data)")
    _expect_classes(cfg, manifest, file)


def _differences(cfg: TrainConfig, manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Return (the config's value, the data's) of every field in which they differ."""
    pairs = {name: (_value(cfg, name), said(manifest)) for name, said in _SAID_BY.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _expect_classes(cfg: TrainConfig, manifest: Manifest, file: Path) -> None:
    if manifest.class_names:
        return
    for index, term in enumerate(cfg.objective.terms):
        if term.weight > 0 and term.target == "category":
            raise ValueError(
                f"term {term.name!r}: expected data with classes, got none in {file}: leave the "
                f"term out by --objective.terms.{index}.weight 0, or pack the data with classes"
            )


def _told(cfg: TrainConfig, manifest: Manifest) -> str:
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
