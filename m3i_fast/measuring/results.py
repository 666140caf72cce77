"""What an evaluation found of encoders side by side: results.json, and arrays for plots."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.durable_files import make_directories, remove_directory, write_atomically
from m3i_fast.evaluation.feature_rows import Index
from m3i_fast.evaluation.statistics import Interval, hits_interval, holm, mean_interval
from m3i_fast.measuring.measure import Figure, Measured
from m3i_fast.measuring.measures import MEASURES
from m3i_fast.measuring.source import Source, Split

RESULTS = "results.json"
PAGE = "page.html"
UNFINISHED = "unfinished.json"


@dataclass(frozen=True, kw_only=True)
class EncoderResults:
    """What one encoder was measured to have."""

    name: str
    digest: str
    step: int | None = None
    """Optimiser steps of the checkpoint that was measured; None: of no checkpoint."""
    dtype: str
    logit_scale: float | None
    measured: Mapping[str, Measured]
    """By the name of a measure."""
    left_out: Mapping[str, str]
    """Why a measure was not measured, by its name."""
    patches: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Of `patch_colours`: the patches of some pictures as colour."""

    def figures(self) -> dict[tuple[str, str], Figure]:
        """Return the figures by (measure, figure)."""
        return {
            (measure, figure.name): figure
            for measure, measured in self.measured.items()
            for figure in measured.figures
        }


@dataclass(frozen=True, kw_only=True)
class Results:
    """An evaluation of an encoder, and of others beside it, on the same rows."""

    source: Source
    encoders: Sequence[EncoderResults]
    """The one that was asked for, then the baselines."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Why pictures could not be decoded, by name."""
    shared_pictures: Sequence[tuple[str, str]] = ()
    """(measured, training) names of pictures of the same bytes."""
    settings: Mapping[str, Any]
    picture_rows: Index = field(default_factory=lambda: np.empty(0, np.int64))
    pictures: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 3, 1, 1), np.uint8))
    """[n, 3, S, S], those of `picture_rows` [n], which a page shows."""

    def comparisons(self) -> dict[str, dict[tuple[str, str], Interval]]:
        """Return the first encoder minus each other one, for figures that are means over items.

        The intervals are paired by item, items of one group depend on each other, and p-values are
        corrected by Holm for all comparisons together.
        """
        first, *others = self.encoders
        family = {
            (other.name, key): _paired(figure, other.figures()[key], self.source.measured)
            for other in others
            for key, figure in first.figures().items()
            if figure.hits is not None and key in other.figures()
        }
        found: dict[str, dict[tuple[str, str], Interval]] = {other.name: {} for other in others}
        for (name, key), interval in holm({k: v for k, v in family.items() if v}).items():
            found[name][key] = interval
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return all of it but the arrays, JSON-able."""
        return {
            "data": describe(self.source),
            "settings": dict(self.settings),
            "encoders": [_encoder(encoder, self.source.measured) for encoder in self.encoders],
            "comparisons": {
                other: {
                    f"{measure}: {figure}": {**asdict(interval), "verdict": interval.verdict}
                    for (measure, figure), interval in of_other.items()
                }
                for other, of_other in self.comparisons().items()
            },
            "broken": dict(self.faults),
            "pictures_also_in_train": [list(pair) for pair in self.shared_pictures],
        }

    def save(self, out: Path) -> None:
        """Write results.json and a folder of .npy files for each encoder, results.json last."""
        make_directories(out)
        measured = self.source.measured
        _remove_earlier(out)
        rows = {
            "names": [item.name for item in measured.items],
            "classes": list(self.source.class_names),
            "labels": measured.label.tolist(),
            "pictures": self.picture_rows.tolist(),
            "captions": [next(iter(measured.items[row].captions), "") for row in self.picture_rows],
        }
        _save_json(out / "rows.json", rows)
        _save_array(out / "pictures.npy", self.pictures)
        for number, encoder in enumerate(self.encoders):
            folder = out / f"{number}_{slug(encoder.name)}"
            make_directories(folder)
            arrays = {name: of.arrays for name, of in encoder.measured.items()}
            for measure, named in {**arrays, "patches": encoder.patches}.items():
                for name, array in named.items():
                    _save_array(folder / f"{measure}.{name}.npy", array)
        _save_json(out / RESULTS, self.as_dict())
        (out / UNFINISHED).unlink(missing_ok=True)

    def keep(self, out: Path) -> None:
        """Write the figures so far to unfinished.json, which `save` removes."""
        make_directories(out)
        _save_json(out / UNFINISHED, self.as_dict())


def describe(source: Source) -> dict[str, Any]:
    """Return the counts of a source."""
    return {
        "path": source.options.path.name,
        "kind": source.options.kind,
        "digest": source.digest,
        "classes": len(source.class_names),
        "refused": len(source.refusals),
        "measured": _counts(source.measured, source),
        "train": None if source.train is None else _counts(source.train, source),
    }


def expect_replaceable(out: Path, *, model: str, data: Path) -> None:
    """Raise ValueError where `save` would remove what is no earlier result of the same question.

    model, data: as the settings of an evaluation name them.
    """
    if not (out / RESULTS).is_file():
        if (out / PAGE).is_file():
            raise ValueError(f"--out: expected a folder without a {PAGE} of others, got {out}")
        return
    try:
        before = json.loads((out / RESULTS).read_bytes())
        found = before["settings"]["model"], before["data"]["path"]
        is_same = Path(found[0]).absolute() == Path(model).absolute()  # runs/demo/ is runs/demo
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"--out: expected a folder without a {RESULTS} of others, got {out}: name another"
        ) from None
    name = data.absolute().name
    if not is_same or found[1] != name:
        raise ValueError(
            f"--out: expected a folder of results of {model} on {name}, got {out} with those "
            f"of {found[0]} on {found[1]}: name another with --out, or remove it"
        )


def expect_kept(
    out: Path, *, source: Source, encoders: Sequence[str], measures: Iterable[str]
) -> None:
    """Raise ValueError where `save` would remove figures that the new ones do not replace.

    encoders: as they are asked for, the model first, which is that of `expect_replaceable`.
    """
    if not (out / RESULTS).is_file():
        return
    before = json.loads((out / RESULTS).read_bytes())
    digest = source.split_digest(source.measured)
    if before["data"].get("measured", {}).get("digest", digest) != digest:
        raise ValueError(
            f"--out: expected a folder of results of these pictures, got {out} with those of "
            f"others, in a folder {source.options.path.name} as well or in this one before: name "
            "another, or remove it"
        )
    kept = {(name, measure) for name in encoders for measure in measures}
    lost = []
    for number, encoder in enumerate(before.get("encoders", [])):
        name = encoders[0] if number == 0 else encoder["name"]
        lost += [f"{m} of {name}" for m in encoder["measures"] if (name, m) not in kept]
    if lost:
        raise ValueError(
            f"--out: {out} holds {', '.join(lost)}, which these results would replace: measure "
            "them as well (--measures, --baseline), name another --out, or remove it"
        )


def slug(name: str) -> str:
    """Return a name as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_")[-120:]


def _remove_earlier(out: Path) -> None:
    """Remove what an earlier evaluation wrote there: its figures, then folders of arrays alone."""
    for name in (RESULTS, PAGE, "pictures.npy"):
        (out / name).unlink(missing_ok=True)
    for folder in out.glob("[0-9]*_*"):
        if folder.is_dir() and all(file.suffix == ".npy" for file in folder.iterdir()):
            remove_directory(folder)


def _counts(split: Split, source: Source) -> dict[str, Any]:
    return {
        "split": split.name,
        "digest": source.split_digest(split),
        "rows": len(split),
        "labelled": split.num_labelled,
        "captioned": split.num_captioned,
        "captions": len(split.captions),
        "classes": len(split.classes),
    }


def _encoder(encoder: EncoderResults, split: Split) -> dict[str, Any]:
    return {
        "name": encoder.name,
        "digest": encoder.digest,
        "step": encoder.step,
        "dtype": encoder.dtype,
        "logit_scale": encoder.logit_scale,
        "measures": {
            name: {
                "title": MEASURES[name].title,
                "protocol": MEASURES[name].protocol,
                "paper": MEASURES[name].paper,
                "settings": measured.settings,
                "figures": {figure.name: figure.value for figure in measured.figures},
                "intervals": {
                    figure.name: list(mean_interval(figure.hits, split.group[figure.rows]))
                    for figure in measured.figures
                    if figure.hits is not None
                },
                "details": measured.details,
            }
            for name, measured in encoder.measured.items()
        },
        "not_measured": dict(encoder.left_out),
    }


def _paired(ours: Figure, theirs: Figure, split: Split) -> Interval | None:
    """Return the interval of a difference, over the items that both have.

    None for fewer than two groups, and where items that differ have no names to pair them by, as
    several captions of one picture.
    """
    if ours.hits is None or ours.rows is None or theirs.hits is None or theirs.rows is None:
        return None
    first, second = np.arange(len(ours.rows)), np.arange(len(theirs.rows))
    if not np.array_equal(ours.rows, theirs.rows):
        if any(len(np.unique(rows)) < len(rows) for rows in (ours.rows, theirs.rows)):
            return None
        _, first, second = np.intersect1d(ours.rows, theirs.rows, return_indices=True)
    group = split.group[ours.rows[first]]
    if len(np.unique(group)) < 2:
        return None
    return hits_interval(ours.hits[first], theirs.hits[second], group)


def _save_array(file: Path, array: NDArray[Any]) -> None:
    content = io.BytesIO()
    np.save(content, array)
    write_atomically(file, content.getvalue())


def _save_json(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(file, text.encode())
