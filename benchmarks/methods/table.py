"""Rows of the methods' benchmark as tables: each method's figures, and M3I's minus its own.

Figures are means over a method's seeds. A difference is taken item by item and seed by seed, over
the seeds that both methods ran; its interval is over seeds and items
(`statistics.variance_components`).
All of it stands twice, for all held-out concepts and for the hard half of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.benchmarks.ledger.rows import commit_of
from m3i_fast.benchmarks.methods.run import unpack
from m3i_fast.evaluation.held_out import ENDINGS
from m3i_fast.evaluation.statistics import (
    Floats,
    Interval,
    hits_interval,
    holm,
    values_interval,
)

Row = dict[str, Any]  # of the ledger
Rows = dict[str, dict[int, Row]]  # method -> seed -> row

OURS = "m3i"
UNTRAINED = "untrained"  # the rows of what M3I's runs start from
OTHERS = {"untrained": "untrained", "raw pixels": "pixels"}  # line -> source in those rows
# The columns, where they were measured; other measures with hits stand behind them.
TITLES = {
    "knn_top1": "kNN",
    "linear_top1": "linear",
    "few_label_top1": "few labels",
    "scene_patch_top1": "scenes, patches",
    "scene_miou": "scenes, mIoU",
    "caption_to_image_recall_at_5": "caption to image R@5",
    "image_to_caption_recall_at_5": "image to caption R@5",
    "patch_correspondence": "patch found again",  # of older rows, by its position too
    "patch_correspondence_centred": "patch found again, centred",
    "caption_information_nats": "captions, nats",
    "effective_rank": "effective rank",
}
NO_SHARE = ("caption_information_nats", "effective_rank")  # not in percent


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: a method over its seeds, or what it is compared with."""

    name: str
    values: dict[str, float]
    """Measure -> mean, in the table's unit."""
    minus: dict[str, Interval]
    """Measure with hits -> M3I minus this line, in the same unit; empty for M3I."""
    rows: list[Row]
    """One a seed; empty for what was not trained."""

    def each(self, field: str) -> list[Any]:
        """Return a figure of every seed."""
        return [row["figures"][field] for row in self.rows]


def title(measure: str) -> str:
    base, ending = parse(measure)
    return TITLES.get(base, base) + (", hard half" if ending else "")


def scale(measure: str) -> float:
    """From a row's figure to the table's unit, mostly percent."""
    return 1.0 if parse(measure)[0] in NO_SHARE else 100.0


def parse(measure: str) -> tuple[str, str]:
    """Split off the one of ENDINGS that says on which items a measure was taken."""
    base = measure.removesuffix(ENDINGS[1])
    return base, measure[len(base) :]


def measures(lines: Sequence[Line], shown: Container[str] = ()) -> list[str]:
    """Return what any line has, in the order of TITLES, then the same of the hard half.

    shown: of these alone; empty: all.
    """
    names = dict.fromkeys(name for line in lines for name in line.values)
    bases = dict.fromkeys((*TITLES, *(parse(name)[0] for name in names)))
    chosen = [base for base in bases if not shown or base in shown]
    return [base + ending for ending in ENDINGS for base in chosen if base + ending in names]


# ---- From rows to lines --------------------------------------------------------------------------


def summarise(rows: Rows) -> list[Line]:
    """Return a line a method, in the order of `rows`; then no training, of M3I's seeds."""
    ours = rows.get(OURS, {})
    lines = [
        _line(name, list(seeds.values()), "trained", seeds, ours)
        for name, seeds in rows.items()
        if name != UNTRAINED
    ]
    rest = {seed: row for seed, row in rows.get(UNTRAINED, {}).items() if seed in ours}
    return lines + [_line(name, [], source, rest, ours) for name, source in OTHERS.items() if rest]


def _line(
    name: str, trained: list[Row], source: str, theirs: dict[int, Row], ours: dict[int, Row]
) -> Line:
    values, minus = {}, {}
    for measure in dict.fromkeys(m for row in theirs.values() for m in _names(row)):
        compared = [
            figures[measure][source]
            for figures in (row["figures"] for row in theirs.values())
            if source in figures.get(measure, {})
        ]
        if compared:
            values[measure] = scale(measure) * fmean(compared)
        if name != OURS and (interval := _minus(ours, theirs, source, measure)) is not None:
            minus[measure] = interval
    return Line(name, values, minus, trained)


def _names(row: Row) -> Iterator[str]:
    """Its measures, each before its form on the hard half where the row has one."""
    figures = row["figures"]
    whole = [name for name in TITLES if name in figures]
    whole += [name for hits in figures["hits"].values() for name in hits]
    for name in whole:
        yield name
        if name + ENDINGS[1] in figures:
            yield name + ENDINGS[1]


def _minus(
    ours: dict[int, Row], theirs: dict[int, Row], source: str, measure: str
) -> Interval | None:
    """M3I's hits minus those of a source, over the seeds where both have the measure."""
    name, ending = parse(measure)
    pairs = [
        (mine, mine["hits"]["trained"][name], other["hits"][source][name])
        for mine, other in (
            (ours[seed]["figures"], theirs[seed]["figures"])
            for seed in sorted(ours.keys() & theirs.keys())
        )
        if name in mine["hits"]["trained"] and name in other["hits"][source]
    ]
    if not pairs:
        return None
    rows, *sides = zip(*pairs, strict=True)
    first, second = (np.array([unpack(hits) for hits in side]) for side in sides)  # [S, N]
    asked, cluster = _items(rows[0], first, ending)
    interval = values_interval if name in NO_SHARE else hits_interval
    return interval(first[:, asked], second[:, asked], cluster).scaled(scale(measure))


def _items(
    figures: dict[str, Any],
    hits: Floats,  # [S, N], NaN where an item was not asked about
    ending: str,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64] | None]:
    """Which items a measure is of, [N], and their clusters, which older rows do not have."""
    asked = ~np.isnan(hits[0])
    if "items" not in figures:
        return asked, None
    if ending:
        asked &= np.array(unpack(figures["items"]["hard"])) == 1
    return asked, np.array(figures["items"]["cluster"])[asked]


# ---- From lines to text --------------------------------------------------------------------------


def table(
    lines: Sequence[Line], heading: str, *, shown: Container[str] = (), note: str = ""
) -> str:
    """Markdown: the figures, the differences, and what a reader must know of them.

    shown: the measures that have a column; empty: all. Differences are corrected for all.
    """
    runs = [line for line in lines if line.rows]
    if not runs:
        return f"{heading}: no row in the ledger\n"
    usual = runs[0].each("batch_size")[0]
    whole, hard = (
        [name for name in measures(lines) if parse(name)[1] == ending] for ending in ENDINGS
    )
    training = {
        name: [_training(line, usual)[i] for line in lines]
        for i, name in enumerate(("images/s", "steps", "seeds", "notes"))
    }
    text = [
        f"{heading}, batch {usual}; {_origin(runs)}. In percent, but for nats and ranks.",
        "",
        *_figures(lines, whole, shown, training),
    ]
    if hard:
        text += [
            "The hard half: the held-out concepts that lie farthest from any training picture.",
            "",
            *_figures(lines, hard, shown),
        ]
    if any(_teachers(line) for line in lines):
        text += [
            "(t): from the frozen encoder of `supervised` of the same seed, data and budget, whose "
            "training is not counted.",
            "",
        ]
    return "\n".join([*text, *([f"{note}.", ""] if note else [])])


def brief_table(lines: Sequence[Line], heading: str, *, shown: Container[str] = ()) -> str:
    """Markdown: one table, of both halves; after a value, M3I minus it. Bold as of `table`."""
    if not any(line.rows for line in lines):
        return f"{heading}: no row in the ledger\n"
    told: dict[tuple[str, str], Interval] = {}
    for ending in ENDINGS:
        names = [name for name in measures(lines) if parse(name)[1] == ending]
        told |= holm({(x.name, m): x.minus[m] for x in lines for m in names if m in x.minus})
    columns = measures(lines, shown)

    def cell(line: Line, measure: str) -> str:
        minus = told.get((line.name, measure))
        value = _value(line, measure)
        return value if minus is None else f"{value}, {_difference(minus, measure)}"

    rows = [[_label(x), *(cell(x, name) for name in columns)] for x in lines]
    return "\n".join([f"{heading}.", "", *_grid(["method", *map(title, columns)], rows), ""])


def _figures(
    lines: Sequence[Line],
    measured: Sequence[str],
    shown: Container[str],
    training: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Return the table of a half's values, and that of M3I minus each line, corrected for all.

    training: further columns.
    """
    columns = [name for name in measures(lines, shown) if name in measured]
    more = training or {}
    rows = [
        [_label(x), *(_value(x, m) for m in columns), *(column[i] for column in more.values())]
        for i, x in enumerate(lines)
    ]
    head = ["method", *(title(parse(name)[0]) for name in columns), *more]
    return [*_grid(head, rows), "", *_differences(lines, measured, columns)]


def _differences(
    lines: Sequence[Line], measured: Sequence[str], columns: Sequence[str]
) -> list[str]:
    family = holm({(x.name, m): x.minus[m] for x in lines for m in measured if m in x.minus})
    compared = [name for name in columns if any(m == name for _, m in family)]
    if not compared:
        return ["No difference to M3I: the ledger has no row of it, or of nothing else.", ""]
    return [
        "M3I minus each row, with its 95 % interval over seeds and items (of one seed, over items "
        "alone; near-duplicates vary as one). In bold: what Holm's correction over all "
        f"{len(family)} comparisons, shown or not, leaves.",
        "",
        *_grid(
            ["method", *(title(parse(name)[0]) for name in compared)],
            [
                [_label(x), *(_difference(family.get((x.name, m)), m) for m in compared)]
                for x in lines
                if any(name == x.name for name, _ in family)
            ],
        ),
        "",
    ]


def _grid(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def _origin(runs: Sequence[Line]) -> str:
    """Say what was measured where: `336 held-out concepts, 2 cores of CPU, commit 123`."""
    rows = [row for line in runs for row in line.rows]
    counts = sorted({row["figures"]["held_out_concepts"] for row in rows})
    commits = sorted({commit_of(row) for row in rows})
    machines = sorted(
        {f"{m['num_cores']} cores of {m['cpu']}" for m in (r["machine"] for r in rows)}
    )
    splits = sorted({row["figures"].get("split_digest", "") for row in rows} - {""})
    split = f" (split {_joined(splits)})" if splits else ""
    concepts = f"{_joined(counts)} held-out concepts{split}"
    return f"{concepts}, {_joined(machines)}, commit {_joined(commits)}"


def _label(line: Line) -> str:
    return f"{line.name} (t)" if _teachers(line) else line.name


def _teachers(line: Line) -> list[str]:
    return [name for name in line.each("teacher") if name is not None]


def _digits(measure: str) -> int:
    return 2 if parse(measure)[0].endswith("_nats") else 1


def _value(line: Line, measure: str) -> str:
    return f"{line.values[measure]:.{_digits(measure)}f}" if measure in line.values else "-"


def _difference(interval: Interval | None, measure: str) -> str:
    if interval is None:
        return "-"
    digits, mark = _digits(measure), "" if interval.verdict == "no difference found" else "**"
    difference, low, high = (
        f"{x:+.{digits}f}" for x in (interval.difference, interval.low, interval.high)
    )
    return f"{mark}{difference}{mark} ({low} to {high})"


def _training(line: Line, usual_batch: int) -> list[str]:
    """Cells: images a second, steps, seeds, notes."""
    if not line.rows:
        return ["-", "-", "-", ""]
    steps = line.each("num_steps")
    collapsed = {
        name.removeprefix("monitor/") for names in line.each("collapsed") for name in names
    }
    batches = {size for size in line.each("batch_size") if size != usual_batch}
    notes = [f"batch {_joined(sorted(batches))}"] if batches else []
    notes += [f"collapsed: {_joined(sorted(collapsed))}"] if collapsed else []
    return [
        f"{fmean(line.each('train_images_per_s')):.0f}",
        f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else str(steps[0]),
        _joined(line.each("seed")),
        "; ".join(notes),
    ]


def _joined(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
