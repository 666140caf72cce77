"""What a campaign found: a page and a picture of the rows of the newest one in the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.core import svg
from m3i_fast.benchmarks.ledger.rows import commit_of, read_rows

SUBJECT = "faults"
Row = dict[str, Any]  # a row of the ledger
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE = DOCS / "measure" / "faults.md", DOCS / "pictures" / "faults.svg"
MANY = 3  # trials of a fault from which on each is not named on the page

_WIDTH, _NAMES, _TOP, _LINE = 920, 250, 64, 22  # pixels
_SIDE, _COLUMNS = 8, 78  # of a trial's square; squares a line
HEAD = """\
# Faults

To see which faults a run survives, and whether it ends with the weights that it would have had.

Made by `m3i-fast faults --record`; the rows are in `benchmarks/results/faults.jsonl`, one a trial.
Each trial spoils a run of tiny M3I of twelve steps (all terms, a checkpoint every two steps, in the
background), starts it again with the same command line, and compares its weights, moments,
averages and losses with those of the run to which nothing happened, bit for bit. After a NaN they
are compared with a run whose step is undone by copies of all state; on another number of ranks,
which add up in another order, what is loaded is compared with what was saved. On a CPU,
over gloo; no campaign has run on a GPU.

![a square a trial](../pictures/faults.svg)

"""


def newest() -> list[Row]:
    """Return the rows of the ledger's last campaign."""
    rows = list(read_rows(SUBJECT))
    last = rows[-1]["figures"]["campaign"] if rows else None
    return [row for row in rows if row["figures"]["campaign"] == last]


def by_fault(rows: Sequence[Row]) -> dict[str, list[Row]]:
    trials: dict[str, list[Row]] = {}
    for row in rows:
        trials.setdefault(row["figures"]["fault"], []).append(row["figures"])
    return trials


def page(rows: Sequence[Row]) -> str:
    """Return the page as Markdown. A fault of few trials says where it struck."""
    good = sum(row["figures"]["weights_equal"] for row in rows)
    first = rows[0]
    machine = f"{first['machine']['num_cores']} cores of {first['machine']['cpu']}"
    lines = [
        f"{good} of {len(rows)} trials ended with equal weights (commit {commit_of(first)}, "
        f"{machine}, {first['figures']['campaign']}).",
        "",
        "| fault | trials | recovered | weights equal | where |",
        "| --- | --- | --- | --- | --- |",
    ]
    for fault, trials in by_fault(rows).items():
        counts = (sum(trial[name] for trial in trials) for name in ("recovered", "weights_equal"))
        where = "; ".join(trial["where"] for trial in trials) if len(trials) < MANY else ""
        lines.append(f"| {' | '.join(map(str, (fault, len(trials), *counts, where)))} |")
    return HEAD + "\n".join(lines) + "\n"


def picture(rows: Sequence[Row]) -> str:
    """Return the SVG of a square a trial, whose tooltip says where the fault struck."""
    good = sum(row["figures"]["weights_equal"] for row in rows)
    title = f"{good} of {len(rows)} spoilt runs ended with the weights of the run without a fault"
    elements, y = [svg.text(20, 34, title, "title", "start")], _TOP
    for fault, trials in by_fault(rows).items():
        elements.append(svg.text(_NAMES - 10, y + _SIDE, fault, "", "end"))
        for start in range(0, len(trials), _COLUMNS):
            elements += _squares(trials[start : start + _COLUMNS], y)
            y += _SIDE + 2
        y += _LINE - _SIDE - 2
    return svg.page(elements, width=_WIDTH, height=y, label=title)


def _squares(trials: Sequence[Row], y: int) -> Iterator[str]:
    for column, trial in enumerate(trials):
        kind = "ours" if trial["weights_equal"] else "others"
        x = _NAMES + column * _SIDE
        yield (
            f'<rect class="{kind}" x="{x}" y="{y}" width="{_SIDE - 1}" height="{_SIDE - 1}">'
            f"<title>{escape(trial['where'])}</title></rect>"
        )
