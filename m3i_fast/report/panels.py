"""Plotly figures of the pages. Colours are CSS variables, which report.js resolves.

One figure then serves both colour schemes and follows a change of the scheme.
"""

from __future__ import annotations

import base64
import gzip
import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CURVE_HEIGHT = 170
BAR_HEIGHT = 30
LEGEND_HEIGHT = 22  # of a row of names


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure with its heading; `label` describes it to those who cannot see it."""

    id: str
    title: str
    note: str
    label: str
    height: int
    figure: dict[str, Any]


def plotly_source() -> str:
    """Return plotly.js, gzipped, in base64: 2 MB instead of 5."""
    source: str = _plotly("plotly.offline").get_plotlyjs()
    return base64.b64encode(gzip.compress(source.encode(), 9, mtime=0)).decode()


def panel(
    name: str,
    title: str,
    note: str,
    label: str,
    height: int,
    traces: list[dict[str, Any]],
    layout: dict[str, Any],
) -> Panel:
    common = {
        "template": None,
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--muted)"},
        "hoverlabel": {
            "bgcolor": "var(--raised)",
            "bordercolor": "var(--rule)",
            "font": {"color": "var(--ink)"},
        },
    }
    figure = _plotly("plotly.graph_objects").Figure(data=traces, layout=common | layout)
    return Panel(name, title, note, label, height, figure.to_plotly_json())


def axis(*, nticks: int = 0, title: str = "") -> dict[str, Any]:
    return {
        "nticks": nticks,
        "title": {"text": title, "standoff": 2, "font": {"size": 12}},
        "gridcolor": "var(--rule)",
        "zeroline": False,
        "ticks": "",
        "ticklabelstandoff": 4,
    }


def legend(in_a_row: int) -> dict[str, Any]:
    """Return the layout of a legend above the figure, in columns of one width."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "entrywidth": 1 / in_a_row,
        "entrywidthmode": "fraction",
        "traceorder": "normal",
        "font": {"color": "var(--ink)", "size": 11},
        "itemclick": False,
        "itemdoubleclick": False,
    }


def bars_panel(
    name: str,
    title: str,
    note: str,
    label: str,
    names: list[str],
    values: list[float],
    texts: list[str],
    colours: list[str],
    *,
    margin: int,  # pixels for the names
    room: float,  # width of the figure over the longest bar: the texts stand behind the bars
) -> Panel:
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": values,
        "text": texts,
        "textposition": "outside",
        "cliponaxis": False,
        "textfont": {"color": "var(--ink)"},
        "marker": {"color": colours, "line": {"width": 0}},
        "hoverinfo": "skip",
        "showlegend": False,
    }
    layout = {
        "xaxis": {"visible": False, "fixedrange": True, "range": [0, room * max(*values, 1e-9)]},
        "yaxis": axis() | {"autorange": "reversed", "showgrid": False, "fixedrange": True},
        "bargap": 0.28,
        "margin": {"l": margin, "r": 4, "t": 2, "b": 2},
    }
    return panel(name, title, note, label, BAR_HEIGHT * len(names) + 4, [trace], layout)


def plain(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _plotly(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'm3i-fast[eval]'") from error
