"""One self-contained page that shows what is in a data set, as training sees it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3i_fast.durable_files import write_atomically
from m3i_fast.report import template
from m3i_fast.report.data.inputs import (
    DataPageInputs,
    NearPair,
    Refusal,
)
from m3i_fast.report.sample_card import photo, printable, sample_card

MOST_BARS = 12  # of a histogram of numbers
MOST_CLASSES = 24  # shown, the most frequent ones
MOST_REFUSED = 100  # listed by name

_HERE, _SHARED = Path(__file__).parent, Path(template.__file__).parent


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a histogram; width is a percentage of the longest."""

    name: str
    width: str
    text: str


@dataclass(frozen=True, slots=True)
class Histogram:
    title: str
    note: str
    bars: Sequence[Bar]


def write_data_page(inputs: DataPageInputs, path: Path) -> Path:
    """Write the page to `path`, replacing an older one whole, and return the path."""
    write_atomically(path, render_data_page(inputs).encode())
    return path


def render_data_page(inputs: DataPageInputs) -> str:
    """Return the page as HTML that makes no request: styles and pictures are inline."""
    return template.render(
        _HERE / "page.html",
        styles=[_SHARED / "sample_card.css", _HERE / "page.css"],
        scripts=[_SHARED / "scheme.js"],
        title=f"What is in {printable(inputs.name)}",
        summary=_summary(inputs),
        tiles=_tiles(inputs),
        split=printable(inputs.split),
        num_shown=len(inputs.samples),
        num_samples=inputs.num_samples,
        views_of=printable(inputs.views_of),
        samples=[sample_card(sample) for sample in inputs.samples],
        has_regions=any(sample.regions for sample in inputs.samples),
        histograms=_histograms(inputs),
        num_counted=len(inputs.counted.labels),
        near=[_pair(pair) for pair in inputs.near],
        near_said=_near_said(inputs),
        refused=_refused(inputs.refused),
        settings=[(key, _setting(value)) for key, value in inputs.views_config.items()],
        attribution=printable(inputs.attribution),
    )


# ---- Words ---------------------------------------------------------------------------------------


def _summary(inputs: DataPageInputs) -> list[str]:
    shown, total = len(inputs.samples), inputs.num_samples
    which = "All" if shown == total else f"{shown:,} of the {total:,}"
    sentences = [
        f"{which} pictures of split {printable(inputs.split)} as training sees them, with the "
        f"views that {printable(inputs.views_of)} cuts of each."
    ]
    counted = len(inputs.counted.labels)
    if counted < total:
        sentences.append(f"Histograms and near duplicates are of {counted:,} of its pictures.")
    return sentences


def _tiles(inputs: DataPageInputs) -> list[dict[str, str]]:
    total = inputs.num_samples
    heights, widths = zip(*inputs.counted.sizes, strict=True)
    short = np.median([min(size) for size in inputs.counted.sizes])
    median = f"median, of {np.median(widths):.0f} x {np.median(heights):.0f}"
    tiles = [
        (f"{total:,}", "pictures", f"{inputs.num_groups:,} groups"),
        (_share(inputs.num_captions, total), "with a caption", f"{inputs.num_captions:,}"),
        (
            _share(inputs.num_labels, total),
            "with a class",
            f"{inputs.num_labels:,}, in {len(inputs.class_names):,} classes",
        ),
        *(
            (
                _share(column["known"], total),
                f"with {column['column']}",
                f"{column['known']:,}, {column['kind']}"
                + (f" of {column['names']:,}" if column["names"] else ""),
            )
            for column in inputs.columns
        ),
        (f"{short:.0f}", "pixels, short side", median),
        (f"{inputs.num_near:,}", "near duplicates", "pairs of different groups"),
    ]
    if inputs.refused is not None:
        tiles.append((f"{len(inputs.refused):,}", "left out", "of the source"))
    return [{"value": v, "label": label, "detail": detail} for v, label, detail in tiles]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g}%"


def _near_said(inputs: DataPageInputs) -> str:
    compared = ", ".join(f"{number:,} of {printable(n)}" for n, number in inputs.compared.items())
    said = ""
    if packed := inputs.near_grouped:
        said += (
            f"Packing put {packed['pictures']:,} near duplicates into {packed['groups']:,} groups, "
            f"and left {packed['in_another_split']:,} with one in another split. "
        )
    said += f"Centre squares of {compared} were compared with each other. "
    in_group = f"{inputs.num_near_in_group:,} near pairs share a group, as they should. "
    said += in_group if inputs.num_near_in_group else ""
    if not inputs.num_near:
        return said + "No pictures of different groups are nearly equal."
    return said + (
        f"{inputs.num_near:,} pairs of different groups are nearly equal: the objective takes them "
        "for different things, unless they get one group_id. A pair of two splits is a held-out "
        "picture that was trained on."
    )


def _setting(value: Any) -> str:
    if isinstance(value, tuple):
        return " to ".join(f"{each:.4g}" for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


# ---- Pictures ------------------------------------------------------------------------------------


def _pair(pair: NearPair) -> dict[str, Any]:
    apart = pair.splits[0] != pair.splits[1]
    return {
        "pictures": [
            (photo(picture, f"{printable(split)}, sample {i}"), f"{printable(split)}, sample {i}")
            for picture, i, split in zip(pair.pictures, pair.sample_ids, pair.splits, strict=True)
        ],
        "distance": f"distance {pair.distance:.3f}",
        "apart": apart,
    }


# ---- Histograms ----------------------------------------------------------------------------------


def _histograms(inputs: DataPageInputs) -> list[Histogram]:
    counted = inputs.counted
    lengths = [n for n in counted.num_tokens if n]
    cut = sum(n == inputs.context_length for n in lengths)
    short = [min(size) for size in counted.sizes]
    ratios = [width / height for height, width in counted.sizes]
    found = [
        _classes(inputs),
        Histogram("Short side", "pixels of the shorter side", number_bars(short)),
        Histogram("Shape", "width / height", _ratio_bars(ratios)),
    ]
    if lengths:
        note = f"token ids, of at most {inputs.context_length}"
        note += f"; {_share(cut, len(lengths))} fill that, and may have been cut" if cut else ""
        found.append(Histogram("Length of captions", note, number_bars(lengths)))
    return [histogram for histogram in found if histogram.bars]


def _classes(inputs: DataPageInputs) -> Histogram:
    counts = Counter(label for label in inputs.counted.labels if label >= 0)
    some = counts.most_common(MOST_CLASSES)
    seen = f"{len(counts):,} of {len(inputs.class_names):,} classes have pictures here"
    if len(counts) > len(some):
        seen += f"; these {len(some)} have the most, the smallest has {min(counts.values()):,}"
    rows = [(printable(inputs.class_names[label]), number) for label, number in some]
    return Histogram("Classes", seen, _bars(rows, len(inputs.counted.labels)))


def number_bars(values: Sequence[int]) -> list[Bar]:
    """Return a bar a value where there are few, else a bar for each of some equal ranges.

    Ranges of values that differ by more than a factor of eight grow by about a half each.
    """
    counts = Counter(values)
    if len(counts) <= MOST_BARS:
        return _bars([(f"{v:,}", counts[v]) for v in sorted(counts)], len(values))
    low, high = min(values), max(values)
    if high > 8 * low:
        power = max(int(math.log2(max(low, 1))), 0)
        edges = [2**p * f // 2 for p in range(power, int(math.log2(high)) + 2) for f in (2, 3)]
        edges = sorted({*edges, 0} if low == 0 else set(edges))
        edges = [e for e in edges if e <= high] + [next(e for e in edges if e > high)]
        while len(edges) > MOST_BARS + 1:
            edges = edges[::2] if len(edges) % 2 else [*edges[::2], edges[-1]]
    else:
        step = _round_step((high + 1 - low) / MOST_BARS)
        first = low // step * step
        edges = list(range(first, high + step + 1, step))
    rows = []
    for start, end in zip(edges, edges[1:], strict=False):
        number = sum(n for value, n in counts.items() if start <= value < end)
        last = min(end - 1, high)
        rows.append((f"{start:,}" if last == start else f"{start:,} to {last:,}", number))
    while rows and not rows[-1][1]:
        rows.pop()
    while rows and not rows[0][1]:
        rows.pop(0)
    return _bars(rows, len(values))


def _round_step(least: float) -> int:
    """Return the least of 1, 2, 5, 10, 20, ... that is not below `least`."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10


def _ratio_bars(ratios: Sequence[float]) -> list[Bar]:
    """Return bars of width / height between usual formats."""
    edges = (0.0, 0.5, 0.7, 0.9, 1.1, 1.43, 2.0, math.inf)
    names = (
        "under 1:2",
        "1:2 to 7:10",
        "7:10 to 9:10",
        "about square",
        "11:10 to 10:7",
        "10:7 to 2:1",
        "over 2:1",
    )
    counts, _ = np.histogram(ratios, edges)
    return _bars([row for row in zip(names, counts.tolist(), strict=True) if row[1]], len(ratios))


def _bars(rows: Iterable[tuple[str, int]], total: int) -> list[Bar]:
    listed = list(rows)
    longest = max((number for _, number in listed), default=1) or 1
    return [
        Bar(name, f"{100 * number / longest:.1f}%", f"{number:,}, {_share(number, total)}")
        for name, number in listed
    ]


def _refused(rows: Sequence[Refusal] | None) -> dict[str, Any] | None:
    if rows is None:
        return None
    reasons = Counter(printable(row.reason.partition(", got")[0]) for row in rows)
    return {
        "number": len(rows),
        "reasons": reasons.most_common(MOST_BARS),
        "num_reasons": len(reasons),
        "rows": [tuple(map(printable, row)) for row in rows[:MOST_REFUSED]],
    }
