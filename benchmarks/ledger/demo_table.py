"""The demo over several seeds: mean, spread and range of every figure, from the ledger's rows.

m3i-fast demo --seed 0 --record      (then --seed 1, --seed 2)
m3i-fast bench demo
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.ledger.rows import commit_of, read_rows
from m3i_fast.evaluation.held_out import ENDINGS
from m3i_fast.evaluation.statistics import spread
from m3i_fast.flags import read_flags
from m3i_fast.terminal import make_console

SUBJECT = "demo"
MEASURES = {
    "caption_to_image_recall_at_5": "caption to image R@5",
    "image_to_caption_recall_at_5": "image to caption R@5",
    "knn_top1": "kNN",
    "linear_top1": "linear",
    "patch_correspondence": "patch found again",  # of older rows, by its position too
    "patch_correspondence_centred": "patch found again, centred",
}
SOURCES = ("trained", "ema", "untrained", "pixels", "chance")


@dataclass(frozen=True, kw_only=True)
class DemoTable:
    ledger: Path | None = None
    """Folder of the ledger; None: benchmarks/results of the checkout."""


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    command = read_flags(DemoTable, arguments, prog="m3i-fast bench demo", default=DemoTable())
    make_console().print(table(command.ledger), highlight=False, soft_wrap=True)


def table(ledger: Path | None = None) -> str:
    """Return Markdown, in percent: mean over each seed's newest row, and lowest and highest.

    Of the rows that were measured on the same held-out pictures as the newest of all; each measure
    on these and on the hard half of them, where the rows have it.
    """
    demo_rows = list(read_rows(SUBJECT, folder=ledger))
    splits = [row["figures"].get("split_digest") for row in demo_rows]
    newest = {
        row["figures"]["seed"]: row
        for row, split in zip(demo_rows, splits, strict=True)
        if split == splits[-1]
    }
    if not newest:
        return "no row of the demo in the ledger: m3i-fast demo --record appends one"
    rows = [row["figures"] for _, row in sorted(newest.items())]
    commits = sorted({commit_of(row) for row in newest.values()})
    machine = next(iter(newest.values()))["machine"]
    speed = spread([row["train_images_per_s"] for row in rows])
    measures = [name + ending for ending in ENDINGS for name in MEASURES]
    sources = [s for s in SOURCES if any(s in row.get(m, {}) for row in rows for m in measures)]
    lines = [
        f"seeds {sorted(newest)}, {rows[0]['held_out_concepts']} held-out concepts, "
        f"{_range([row['num_steps'] for row in rows])} steps, {speed.mean:.0f} images/s on "
        f"{machine['num_cores']} cores of {machine['cpu']}, commit {', '.join(commits)}",
        "",
        "| measure | " + " | ".join(sources) + " |",
        "|---" * (len(sources) + 1) + "|",
    ]
    for ending, of in zip(ENDINGS, ("", ", hard half"), strict=True):
        for name, title in MEASURES.items():
            if any(name + ending in row for row in rows):
                cells = " | ".join(_cell(rows, name + ending, source) for source in sources)
                lines.append(f"| {title}{of} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict[str, Any]], measure: str, source: str) -> str:
    values = [100 * row[measure][source] for row in rows if source in row.get(measure, {})]
    if not values:
        return "-"
    spreads = spread(values)
    if spreads.lowest == spreads.highest:
        return f"{spreads.mean:.1f}"
    return f"{spreads.mean:.1f} ({spreads.lowest:.1f} to {spreads.highest:.1f})"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
