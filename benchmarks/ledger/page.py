"""The ledger as one page, as tables of the README, and as files of other tools.

m3i-fast bench page [--out FILE]           history and newest tables, one HTML file
m3i-fast bench page --readme               the tables of README and docs, in a checkout
m3i-fast bench page --mllog FILE           lines as MLPerf's logger writes them
m3i-fast bench page --pytest-benchmark FILE    JSON as pytest-benchmark writes it
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.ledger import exports, readme_tables
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger.history import Point, Series, common_settings, series_of, words
from m3i_fast.durable_files import make_directories, write_atomically
from m3i_fast.flags import read_flags
from m3i_fast.report import template
from m3i_fast.terminal import make_console

WIDTH, HEIGHT, MARGIN = 300, 90, 10  # of a chart, in its own units
MANY = 24  # charts of a subject; the newest are shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    out: Path = Path("runs/ledger.html")
    """The page; written unless something else is asked for."""
    readme: bool = False
    """Write the tables of README.md and docs/ anew, in the checkout."""
    mllog: Path | None = None
    """Write all rows as :::MLLOG lines."""
    pytest_benchmark: Path | None = None
    """Write the newest times as pytest-benchmark's JSON, which github-action-benchmark reads."""


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    cfg = read_flags(Config, arguments, prog="m3i-fast bench page", default=Config())
    console = make_console()
    if cfg.readme:
        root = ledger.results_dir().parent.parent
        if not (root / readme_tables.FILES[0]).is_file():
            raise ValueError(
                f"--readme: expected a checkout with {readme_tables.FILES[0]}, got {root}"
            )
        changed = [str(path.relative_to(root)) for path in readme_tables.update(root)]
        console.print(f"written anew: {', '.join(changed) or 'nothing, all as the ledger says'}")
    for path, text_of in (
        (cfg.mllog, exports.mllog),
        (cfg.pytest_benchmark, exports.pytest_benchmark),
    ):
        if path:
            write(path, text_of())
            console.print(f"written: {path}", soft_wrap=True)
    if not (cfg.readme or cfg.mllog or cfg.pytest_benchmark):
        write(cfg.out, render())
        console.print(f"written: {cfg.out}", soft_wrap=True)
    return 0


def write(path: Path, text: str) -> None:
    make_directories(path.absolute().parent)
    write_atomically(path, text.encode())


def render() -> str:
    """Return the page as HTML text that makes no request. Raises ImportError without jinja2."""
    rows = [row for subject in ledger.subjects() for row in ledger.read_rows(subject)]
    if not rows:
        raise ValueError(f"no row in {ledger.results_dir()}: a benchmark appends some")
    days = sorted(row["time"][:10] for row in rows)
    here, shared = Path(__file__).parent, Path(template.__file__).parent
    return template.render(
        here / "page.html",
        styles=[here / "page.css"],
        scripts=[shared / "scheme.js"],
        title="What was measured",
        num_rows=len(rows),
        first=days[0],
        last=days[-1],
        subjects=list(_subjects()),
        tables=[
            {"name": name, "parts": list(_parts(table()))}
            for name, table in readme_tables.TABLES.items()
        ],
    )


def _subjects() -> Iterator[dict[str, Any]]:
    for name in ledger.subjects():
        curves = series_of(name)
        if not curves:
            continue
        shown = sorted(curves[:MANY], key=lambda series: series.machine_class)
        note = f"{len(curves)} series"
        if len(curves) > MANY:
            note += f", the {MANY} measured last are drawn"
        groups = [list(group) for _, group in groupby(shown, key=lambda s: s.machine_class)]
        yield {"name": name, "note": f"{note}.", "classes": list(map(_machine_class, groups))}


def _machine_class(group: list[Series]) -> dict[str, Any]:
    """Charts of one class; what all of them have in common is said once."""
    common = common_settings(group)
    return {
        "name": group[0].machine_class,
        "note": words(common),
        "charts": [_chart(series, series.name(common)) for series in group],
    }


# ---- Charts --------------------------------------------------------------------------------------


def _chart(series: Series, name: str) -> dict[str, Any]:
    """Places of a series' points, evenly spaced in the order of time."""
    points = series.points
    top = max(point.high or point.value for point in points) or 1.0

    def y(value: float) -> float:
        return round(HEIGHT - 1 - value / top * (HEIGHT - 1 - MARGIN), 1)

    gap = (WIDTH - 2 * MARGIN) / max(len(points) - 1, 1)
    marks = []
    for index, point in enumerate(points):
        x = round(MARGIN + gap * index, 1)
        bar = None
        if point.low is not None and point.high is not None:
            bar = f"M{x} {y(point.low)}V{y(point.high)}"
        marks.append({"x": x, "y": y(point.value), "bar": bar, "tip": _tip(point, series.unit)})
    path = "L".join(f"{mark['x']} {mark['y']}" for mark in marks)
    newest = _tip(points[-1], series.unit)
    return {
        "name": name or series.subject,
        "label": newest if len(points) == 1 else f"newest of {len(points)}: {newest}",
        "width": WIDTH,
        "height": HEIGHT,
        "line": f"M{path}",
        "marks": marks,
    }


def _tip(point: Point, unit: str) -> str:
    spread = ""
    if point.low is not None and point.high is not None:
        spread = f" ({point.low:.3g} to {point.high:.3g})"
    return f"{point.value:.3g} {unit}{spread}, {point.time[:10]}, {point.commit}"


# ---- Tables --------------------------------------------------------------------------------------


def _parts(markdown: str) -> Iterator[Mapping[str, Any]]:
    """Tables and paragraphs of what readme_tables.py writes."""
    for block in markdown.strip().split("\n\n"):
        lines = block.splitlines()
        if not lines[0].startswith("|"):
            yield {"head": None, "text": block.replace("`", "")}
            continue
        head, _, *rest = (_cells(line) for line in lines)
        yield {"head": head, "lines": rest}


def _cells(line: str) -> Sequence[str]:
    return [cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")]
