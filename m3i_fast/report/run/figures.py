"""Figures of an evaluation's measures, and of retrieval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from m3i_fast.report.evaluations.verdict import SOURCES, Judgement, percent
from m3i_fast.report.panels import (
    CURVE_HEIGHT,
    LEGEND_HEIGHT,
    Panel,
    axis,
    bars_panel,
    legend,
    panel,
    plain,
)


def bars(judgement: Judgement) -> Panel:
    """Return a measure's value for each source, as horizontal bars."""
    values = judgement.values
    listed = ", ".join(f"{SOURCES[s]} {percent(v)}" for s, v in values.items())
    return bars_panel(
        f"measure-{judgement.name}",
        judgement.title,
        judgement.meaning,
        f"{judgement.title}: {listed}",
        [SOURCES[source] for source in values],
        list(values.values()),
        [percent(value) for value in values.values()],
        [f"var(--{source})" for source in values],
        margin=84,
        room=1.4,
    )


def recall_curve(ranks: Mapping[str, Sequence[int]]) -> Panel:
    """Return the share of captions whose picture is among the k nearest, by k, for each encoder.

    ranks: of the right picture of each caption, 0 = first, among as many pictures.
    """
    number = len(next(iter(ranks.values())))
    nearest = np.arange(1, number + 1)
    shares = {who: np.searchsorted(np.sort(of), nearest) / number for who, of in ranks.items()}
    shares["chance"] = nearest / number
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": SOURCES[who],
            "x": nearest.tolist(),
            "y": plain(share),
            "line": {"color": f"var(--{who})", "width": 2, "shape": "hv"},
            "hovertemplate": f"{SOURCES[who]} %{{y:.1%}}<extra></extra>",
        }
        for who, share in shares.items()
    ]
    half = {who: int(np.searchsorted(share, 0.5)) + 1 for who, share in shares.items()}
    listed = ", ".join(f"{SOURCES[who]} {count}" for who, count in half.items())
    top = LEGEND_HEIGHT * math.ceil(len(traces) / 2)
    layout = {
        "xaxis": axis(title="pictures looked at")
        | {"type": "log", "dtick": 1, "showgrid": False, "fixedrange": True},
        "yaxis": axis(nticks=4) | {"range": [0, 1], "tickformat": ".0%", "fixedrange": True},
        "hovermode": "x unified",
        "legend": legend(2),
        "margin": {"l": 38, "r": 12, "t": top, "b": 40},
    }
    return panel(
        "found-within",
        "Captions whose picture is found",
        f"among so many pictures nearest to the caption; half of them among the nearest: {listed}",
        f"Pictures to look at until half of the captions have theirs: {listed}",
        CURVE_HEIGHT + top,
        traces,
        layout,
    )
