"""Renders a profile's summary as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m3i_fast.durable_files import write_atomically
from m3i_fast.profiling import summary_text as text
from m3i_fast.report import template

_HERE, _SHARED = Path(__file__).parent, Path(template.__file__).parent


def write_page(summary: text.Summary, path: Path) -> Path:
    """Write the page to `path`, replacing an older one whole. Returns the path."""
    write_atomically(path, render_page(summary).encode())
    return path


def render_page(summary: text.Summary) -> str:
    """Return the page as HTML that makes no request."""
    return template.render(
        _HERE / "page.html",
        styles=[_HERE / "page.css"],
        scripts=[_SHARED / "scheme.js"],
        title=text.title(summary),
        sentences=text.sentences(summary),
        notes=summary["notes"],
        tiles=_tiles(summary),
        stages=_bars(summary["stages"]),
        on_gpu=_bars(_on_gpu(summary)),
        families=_bars(summary["families"]),
        activity_title=text.activity_title(summary),
        tables=[pair for pair in text.tables(summary) if pair[0] != "Families"],
    )


def _tiles(summary: text.Summary) -> list[tuple[str, str]]:
    """Return the headline figures as (value, description)."""
    tiles = [
        (f"{summary['step_ms']:.1f} ms", "a step, profiled"),
        (f"{summary['pace']['slowdown']:.2f}x", "the time of a step that is not profiled"),
        (f"{100 * summary['data_wait_share']:.1f}%", "of the step waits for data"),
    ]
    gpu = summary["gpu"]
    if gpu is not None:
        tiles.append((f"{100 * gpu['idle_share']:.1f}%", "of the step the GPU idles"))
        if gpu["comm_overlap"] is not None:
            tiles.append((f"{100 * gpu['comm_overlap']:.0f}%", "of communication is hidden"))
    elif summary["kernels"]:
        outside = 100 * (1 - summary["work_share"])
        tiles.append((f"{outside:.1f}%", "of the step is outside all operators"))
    else:
        inside = 100 * text.os_share(summary)
        tiles.append((f"{inside:.1f}%", "of the step is in calls of the operating system"))
    return tiles


def _on_gpu(summary: text.Summary) -> list[dict[str, Any]]:
    """Return stages with the time in which what they launched ran; empty without a GPU."""
    return [
        {"title": s["title"], "ms": s["device_ms"], "share": s["device_ms"] / summary["step_ms"]}
        for s in summary["stages"]
        if s["device_ms"] is not None
    ]


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return bars relative to the longest, for rows with a share of 0.001 or more."""
    longest = max((row["ms"] for row in rows), default=0.0)
    return [
        {
            "title": row["title"],
            "width": f"{100 * max(row['ms'], 0) / longest:.1f}%" if longest > 0 else "0%",
            "text": f"{100 * row['share']:.1f}%, {row['ms']:.2f} ms",
        }
        for row in rows
        if row["share"] >= 0.001
    ]
