"""What an evaluation prints: the counts before anything is loaded, and the figures side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m3i_fast.evaluation.retrieval.zero_shot import says_nothing
from m3i_fast.evaluation.statistics import Interval
from m3i_fast.measuring.evaluate import Plan, missing_classes
from m3i_fast.measuring.measure import Figure
from m3i_fast.measuring.measures import MEASURES
from m3i_fast.measuring.results import Results

MOST_NAMED = 5


def print_plan(plan: Plan, console: Console) -> None:
    """Print rows, labels, captions and classes of each split, and what will be measured."""
    source = plan.source
    for note in source.notes:
        console.print(note, soft_wrap=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("split", "pictures", "labelled", "captioned", "captions", "classes"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for split in source.splits:
        counts = (len(split), split.num_labelled, split.num_captioned, len(split.captions))
        said = " (measured)" if split is source.measured else " (fitted to)"
        table.add_row(Text(split.name + said), *map(str, (*counts, len(split.classes))))
    console.print(table)
    for line in _warnings(plan):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"measured: {', '.join(plan.measures)}"), soft_wrap=True)
    for name, reason in plan.left_out.items():
        console.print(Text(f"not measured: {name}: {reason}"), soft_wrap=True)


def _warnings(plan: Plan) -> Iterator[str]:
    source = plan.source
    if "zero-shot" in plan.measures and all(map(says_nothing, source.class_names)):
        yield (
            f"zero-shot: classes are called {_some(source.class_names)}, which says nothing in a "
            "prompt: name them by --class-names FILE"
        )
    absent, rows = missing_classes(source)
    if absent:
        yield (
            f"{len(absent)} classes of {source.measured.name} ({rows} pictures) have no labelled "
            f"picture to fit to, and count as wrong there: {_some(absent)}"
        )
    for split in source.splits:
        without = len(split) - split.num_labelled
        if 0 < without < len(split):
            yield (
                f"{split.name}: {without} of {len(split)} pictures have no label; labels are those "
                "of the others"
            )
    if source.refusals:
        said = [f"{refusal.file}: {refusal.reason}" for refusal in source.refusals]
        yield f"{len(said)} left out: {_some(said)}"


def print_results(results: Results, console: Console) -> None:
    """Print the figures of all encoders in one table, and what was told on the way."""
    if results.faults:
        said = [f"{name}: {reason}" for name, reason in results.faults.items()]
        console.print(Text(f"{len(said)} broken pictures left out: {_some(said)}"), soft_wrap=True)
    if shared := results.shared_pictures:
        said = [f"{ours} is {theirs}" for ours, theirs in shared]
        console.print(
            Text(
                f"{len(shared)} measured pictures are also among those fitted to, byte for byte: "
                f"{_some(said)}"
            ),
            soft_wrap=True,
        )
    first, *others = results.encoders
    comparisons = results.comparisons()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("in %", no_wrap=True)
    for encoder in results.encoders:
        table.add_column(Text(encoder.name), justify="right", overflow="fold")
    for key in _all_keys(results):
        cells = [_cell(first.figures().get(key))]
        for other in others:
            interval, figure = comparisons[other.name].get(key), other.figures().get(key)
            cells.append(_cell(figure) + _mark(figure, interval))
        table.add_row(Text(f"{MEASURES[key[0]].title}, {key[1]}"), *map(Text, cells))
    console.print(table)
    if others:
        console.print(
            f"* not told from {first.name}: by the p-value of the paired difference, with Holm's "
            "correction for all comparisons; ? not compared",
            soft_wrap=True,
            highlight=False,
        )
    for encoder in results.encoders:
        for name, reason in encoder.left_out.items():
            console.print(Text(f"{encoder.name}: not measured: {name}: {reason}"), soft_wrap=True)


def _all_keys(results: Results) -> list[tuple[str, str]]:
    keys = dict.fromkeys(key for encoder in results.encoders for key in encoder.figures())
    return sorted(keys, key=lambda key: [*MEASURES].index(key[0]))


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else f"{100 * figure.value:.1f}"


def _mark(figure: Figure | None, interval: Interval | None) -> str:
    """Mark a figure that is neither above nor below the first encoder's, or is not compared."""
    if figure is None:
        return "  "
    if interval is None:
        return " ?"
    return " *" if interval.verdict == "no difference found" else "  "


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return "; ".join(names[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
