"""Predicted beside measured: rows that the op benchmarks made on a card, the worst ratio first.

A row has a prediction where its card has constants and the model describes its call; of the others
the page says why they have none. The first time that a card runs the benchmarks decides what of the
model is right: no prediction is adjusted to a row. Without rows of a card the page has predictions
alone, to be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.roofline.calls import OPS, NotDescribed, call_of, shown_calls
from m3i_fast.costs.gpus import card_of
from m3i_fast.costs.kernels.constants import NAMES, rates_of

OURS = "m3i_fast"
PAGE, FILE = "predicted.md", "predicted.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A measured call beside its prediction."""

    op: str
    name: str
    card: str
    predicted_ms: float
    binds: str
    measured_ms: float

    @property
    def ratio(self) -> float:
        """Return predicted / measured."""
        return self.predicted_ms / self.measured_ms

    @property
    def off(self) -> float:
        """Return by what factor the prediction is off, in either direction."""
        return max(self.ratio, 1 / self.ratio)


def roofline_card(device_name: str) -> str:
    """Return the card of NAMES that a device is. Raises NotDescribed for any other."""
    if "GH200" in device_name:
        return "gh200"
    card = card_of(device_name)
    if isinstance(card, str):
        raise NotDescribed(card)
    if card.name not in NAMES:
        raise NotDescribed(f"card {card.name}, constants are known of {', '.join(NAMES)}")
    return card.name


def compare_row(row: dict[str, Any]) -> Compared:
    """Return a row of the ledger beside its prediction. Raises NotDescribed where it has none."""
    figures = row["figures"]
    if figures.get("device") != "cuda":
        raise NotDescribed(f"measured on {figures.get('device')}, not on a GPU")
    call = call_of(row["subject"], figures)
    card = roofline_card(str(row["machine"]["gpu"]))
    measured = figures["timings"][OURS]["median_ms"]
    made = call.predict(rates_of(card))
    return Compared(
        op=call.op,
        name=f"{call.name}, {figures['dtype']}" if "dtype" in figures else call.name,
        card=card,
        predicted_ms=made.ms,
        binds=made.binds,
        measured_ms=measured,
    )


def compare_rows(rows: Iterable[dict[str, Any]]) -> tuple[list[Compared], dict[str, int]]:
    """Return the rows with a prediction, the worst first, and how many others lack one and why."""
    compared, left = [], dict[str, int]()
    for row in rows:
        try:
            compared.append(compare_row(row))
        except NotDescribed as reason:
            text = f"{row['subject']}: {reason}"
            left[text] = left.get(text, 0) + 1
    return sorted(compared, key=lambda each: -each.off), left


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the ops' benchmarks in a folder, <op>.jsonl each."""
    found = []
    for op in OPS:
        path = folder / f"{op}.jsonl"
        if path.is_file():
            found += [json.loads(line) for line in path.read_text().splitlines() if line]
    return found


def _rows(cells: Iterable[tuple[str, ...]]) -> list[str]:
    return [
        "| op | call | card | predicted, ms | measured, ms | predicted / measured | bound by |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]


def _measured(compared: list[Compared]) -> Iterator[tuple[str, ...]]:
    for each in compared:
        times = f"{each.predicted_ms:.3g}", f"{each.measured_ms:.3g}", f"{each.ratio:.2f}"
        yield each.op, each.name, each.card, *times, each.binds


def _to_be_measured(cards: Iterable[str]) -> Iterator[tuple[str, ...]]:
    for card in cards:
        for call in shown_calls():
            made = call.predict(rates_of(card))
            yield call.op, call.name, card, f"{made.ms:.3g}", "", "", made.binds


def markdown(compared: list[Compared], left: dict[str, int]) -> str:
    """Return the page of predicted beside measured; without a measured row, of predictions."""
    if compared:
        worst = compared[0]
        first = (
            f"The worst of {len(compared)} predictions: {worst.op}, {worst.name}: "
            f"{worst.predicted_ms:.3g} ms predicted, {worst.measured_ms:.3g} ms measured "
            f"({worst.ratio:.2f})."
        )
        table = _rows(_measured(compared))
    else:
        first = (
            "No row of a GPU that the model describes: nothing is compared. A card's first hour "
            "fills the empty columns, from the rows of its benchmarks."
        )
        table = _rows(_to_be_measured(("a100", "h100")))
    lines = ["# Predicted beside measured", "", first, "", *table]
    if left:
        lines += ["", "Without a prediction:", ""]
        lines += [f"- {reason} ({count} rows)" for reason, count in sorted(left.items())]
    return "\n".join(lines) + "\n"


def write_compared(folder: Path) -> tuple[list[Compared], dict[str, int]]:
    """Compare the rows of a folder, and write predicted.md and predicted.json into it."""
    compared, left = compare_rows(read_folder(folder))
    (folder / PAGE).write_text(markdown(compared, left))
    content = {
        "compared": [{**asdict(each), "ratio": each.ratio} for each in compared],
        "left": left,
    }
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n")
    return compared, left
