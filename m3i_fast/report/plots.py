"""Plotly figures of the page. Colours are CSS variables, which report.js resolves.

One figure then serves both colour schemes and follows a change of the scheme.
"""

from __future__ import annotations

import base64
import gzip
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.observe.collapse import HealthyRange, healthy_range
from m3i_fast.observe.stages import STAGES, family_of
from m3i_fast.report.verdict import SOURCES, Judgement, percent

MAX_POINTS = 400  # of a curve; more steps are averaged in bins
MIN_SMOOTHED = 24  # points of a curve that gets a moving mean
CURVE_HEIGHT = 170
BAR_HEIGHT = 30
LEGEND_HEIGHT = 22  # of a row of names
LEGEND_LETTERS = 12  # of the longest name, where two stand in a row
NUM_COLOURS = 6  # --series-0 and on
NAMES = {
    "loss/total": ("Total", "the weighted sum of the terms"),
    "loss/intra": ("Intra-view dense", "features of hidden cells, same view"),
    "loss/inter": ("Inter-view dense", "features of the other view"),
    "loss/category": ("Category", "cross-entropy over the categories"),
    "loss/caption": ("Caption", "cross-entropy over the captions of the batch"),
    "monitor/target_std": ("Spread of targets", "1 when spread evenly, 0 when collapsed"),
    "monitor/target_rank": ("Effective rank of targets", "RankMe: 1 when collapsed"),
    "monitor/target_alignment": ("Alignment", "distance of encoder and target, squared"),
    "monitor/target_uniformity": ("Uniformity of targets", "0 when all point one way"),
    "monitor/target_kmeans_entropy": ("Kinds of targets", "k-means entropy: 0 when of one kind"),
    "monitor/intra_explained": ("Explained, intra-view", "share of the targets' variance"),
    "monitor/inter_explained": ("Explained, inter-view", "share of the targets' variance"),
    "monitor/intra_constant": ("Constant, intra-view", "energy of targets that is one vector"),
    "monitor/inter_constant": ("Constant, inter-view", "energy of targets that is one vector"),
    "monitor/intra_cosine": ("Cosine, intra-view", "prediction and target"),
    "monitor/inter_cosine": ("Cosine, inter-view", "prediction and target"),
    "monitor/category_log_scale": ("Scale, category", "inverse temperature, learned"),
    "monitor/caption_log_scale": ("Scale, caption", "inverse temperature, learned"),
    "optim/lr": ("Learning rate", "as scheduled"),
    "optim/grad_norm": ("Gradient norm", "before clipping"),
    "throughput/img_s": ("Throughput", "training images a second"),
    "bucket/read_gib": ("Read from the bucket", "GiB between two logged steps, all ranks"),
    "bucket/requests": ("Requests", "ranged reads between two logged steps, repeated ones too"),
    "bucket/retries": ("Repeated requests", "between two logged steps"),
    "bucket/wait_s": ("Wait for the bucket", "seconds of a rank between two logged steps"),
    "bucket/cache_hits": ("Found in the cache", "clumps between two logged steps"),
    "bucket/cache_gib": ("Read from the cache", "GiB between two logged steps"),
}


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


def curves(metrics: Sequence[Mapping[str, float]], group: str) -> list[Panel]:
    """Return a panel for every key `group/...` of the logged rows, known ones first."""
    keys = {key for row in metrics for key in row if key.startswith(f"{group}/")}
    known = [key for key in NAMES if key in keys]
    return [curve(metrics, key) for key in known + sorted(keys - set(known))]


def how_drawn(num_rows: int) -> str:
    """Return a sentence on how the curves of so many logged rows are drawn."""
    size = math.ceil(num_rows / MAX_POINTS)
    points = "Every logged step" if size == 1 else f"Means of {size} logged steps"
    return (
        f"{points} (thin) and a moving mean (bold)." if num_rows >= MIN_SMOOTHED else f"{points}."
    )


def curve(metrics: Sequence[Mapping[str, float]], key: str) -> Panel:
    """Return the curve of one key with a moving mean; values that are not finite are gaps.

    Dashed lines are the bounds of the healthy range, where one is known.
    """
    rows = [(row["step"], row[key]) for row in metrics if key in row]
    steps, values = (_binned(np.array(column, float)) for column in zip(*rows, strict=True))
    title, note = NAMES.get(key, (key.split("/", 1)[1].replace("_", " "), ""))
    bounds = healthy_range(key)
    if bounds:
        note += f"; healthy: {bounds.text}" if note else f"healthy: {bounds.text}"
    smooth = _moving_mean(values, window=max(len(values) // 12, 1))
    mode = "lines" if len(values) > 2 else "lines+markers"
    line = {"type": "scatter", "mode": mode, "x": _plain(steps), "showlegend": False}
    many = len(values) >= MIN_SMOOTHED
    traces = [
        line
        | {
            "y": _plain(values),
            "line": {"color": "var(--accent)", "width": 1 if many else 2},
            "opacity": 0.4 if many else 1,
            "hovertemplate": "step %{x:,d}: %{y:.4~g}<extra></extra>",
        }
    ]
    if many:
        accent = {"color": "var(--accent)", "width": 2}
        traces.append(line | {"y": _plain(smooth), "line": accent, "hoverinfo": "skip"})
    finite = values[np.isfinite(values)]
    label = f"{title}: no finite value was logged"
    if len(finite):
        label = f"{title} from {finite[0]:.4g} to {finite[-1]:.4g} over {len(rows)} logged steps"
    layout = {
        "xaxis": _axis(nticks=4, title="step") | {"showgrid": False},
        "yaxis": _axis(nticks=4) | {"tickformat": "~s" if _is_large(finite) else "~g"},
        "shapes": _bounds(bounds) if bounds else [],
        "hovermode": "x",
        "margin": {"l": 38, "r": 12, "t": 8, "b": 40},
    }
    return _panel(key.replace("/", "-"), title, note, label, CURVE_HEIGHT, traces, layout)


def gradient_shares(metrics: Sequence[Mapping[str, float]]) -> Panel | None:
    """Return each term's share of all terms' gradients on the encoder, as a stacked area.

    Shares are means over the logged steps before, since a term that few pictures have targets for
    has a gradient in few steps. None where there is a single term or no gradient was logged.
    """
    steps, shares = _shares_of_terms(metrics)
    if len(shares) < 2:
        return None
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"{name} {_share(share[-1])}",
            "x": _plain(steps),
            "y": _plain(share),
            "stackgroup": "terms",
            "fillcolor": f"var(--series-{number % NUM_COLOURS})",
            "line": {"color": "var(--paper)", "width": 1},
            "hovertemplate": f"{name} %{{y:.1%}}<extra></extra>",
        }
        for number, (name, share) in enumerate(shares.items())
    ]
    listed = ", ".join(f"{name} {_share(share[-1])}" for name, share in shares.items())
    in_a_row = 2 if max(map(len, shares)) <= LEGEND_LETTERS else 1
    top = LEGEND_HEIGHT * math.ceil(len(shares) / in_a_row)
    layout = {
        "xaxis": _axis(nticks=4, title="step") | {"showgrid": False},
        "yaxis": _axis(nticks=4) | {"range": [0, 1], "tickformat": ".0%", "fixedrange": True},
        "hovermode": "x unified",
        "legend": _legend(in_a_row),
        "margin": {"l": 38, "r": 12, "t": top, "b": 40},
    }
    return _panel(
        "gradient-shares",
        "Pull on the encoder",
        "each term's share of the gradient, smoothed; under 1% a term has almost no effect",
        f"Share of the gradient at the last logged steps: {listed}",
        CURVE_HEIGHT + top,
        traces,
        layout,
    )


def _shares_of_terms(
    metrics: Sequence[Mapping[str, float]],
) -> tuple[npt.NDArray[np.float64], dict[str, npt.NDArray[np.float64]]]:
    """Return the logged steps, and each term's share of all terms' gradients there."""
    prefix = "gradient/"
    names = [key.removeprefix(prefix) for key in metrics[-1] if key.startswith(prefix)]
    rows = [row for row in metrics if all(prefix + name in row for name in names)]
    steps = _binned(np.array([row["step"] for row in rows], float))
    columns = (np.array([row[prefix + name] for row in rows], float) for name in names)
    pulls = [_trailing_mean(_binned(column), max(len(steps) // 6, 1)) for column in columns]
    total = np.maximum(sum(pulls, start=np.zeros(len(steps))), 1e-30)
    return steps, {name: pull / total for name, pull in zip(names, pulls, strict=True)}


def _share(value: float) -> str:
    """Format a share for a legend, with a decimal where it is small."""
    return percent(value) if value < 0.1 else f"{100 * value:.0f}%"


def _legend(in_a_row: int) -> dict[str, Any]:
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


def _bounds(bounds: HealthyRange) -> list[dict[str, Any]]:
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1}
    dashed = {"line": {"color": "var(--muted)", "width": 1, "dash": "dash"}}
    finite = [bound for bound in (bounds.low, bounds.high) if math.isfinite(bound)]
    return [line | dashed | {"y0": bound, "y1": bound} for bound in finite]


def bars(judgement: Judgement) -> Panel:
    """Return a measure's value for each source, as horizontal bars."""
    values = judgement.values
    listed = ", ".join(f"{SOURCES[s]} {percent(v)}" for s, v in values.items())
    return _bars(
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
            "y": _plain(share),
            "line": {"color": f"var(--{who})", "width": 2, "shape": "hv"},
            "hovertemplate": f"{SOURCES[who]} %{{y:.1%}}<extra></extra>",
        }
        for who, share in shares.items()
    ]
    half = {who: int(np.searchsorted(share, 0.5)) + 1 for who, share in shares.items()}
    listed = ", ".join(f"{SOURCES[who]} {count}" for who, count in half.items())
    top = LEGEND_HEIGHT * math.ceil(len(traces) / 2)
    layout = {
        "xaxis": _axis(title="pictures looked at")
        | {"type": "log", "dtick": 1, "showgrid": False, "fixedrange": True},
        "yaxis": _axis(nticks=4) | {"range": [0, 1], "tickformat": ".0%", "fixedrange": True},
        "hovermode": "x unified",
        "legend": _legend(2),
        "margin": {"l": 38, "r": 12, "t": top, "b": 40},
    }
    return _panel(
        "found-within",
        "Captions whose picture is found",
        f"among so many pictures nearest to the caption; half of them among the nearest: {listed}",
        f"Pictures to look at until half of the captions have theirs: {listed}",
        CURVE_HEIGHT + top,
        traces,
        layout,
    )


def time_shares(metrics: Sequence[Mapping[str, float]]) -> Panel | None:
    """Return the median time of each stage over the logged steps, and its share of a step."""
    rows = [row for row in map(_by_stage, metrics) if row]
    logged = {name: [r[key] for r in rows if key in r] for key, name in STAGES.items()}
    median = {name: float(np.median(values)) for name, values in logged.items() if values}
    total = sum(median.values())
    if total <= 0:
        return None
    names = list(median)
    texts = [f"{100 * ms / total:.0f}%, {_milliseconds(ms)}" for ms in median.values()]
    label = "Time of a step: " + ", ".join(map(" ".join, zip(names, texts, strict=True)))
    return _bars(
        "time-shares",
        "Time of a step",
        f"{_milliseconds(total)}, medians over the logged steps",
        label,
        names,
        list(median.values()),
        texts,
        ["var(--accent)"] * len(names),
        margin=116,
        room=2.0,
    )


def _by_stage(row: Mapping[str, float]) -> dict[str, float]:
    """Return milliseconds of a logged step by the keys of STAGES; those of terms are summed."""
    sums: dict[str, float] = {}
    for key, value in row.items():
        if key.startswith("time/"):
            stage = family_of(key.removeprefix("time/").removesuffix("_ms"))
            sums[stage] = sums.get(stage, 0.0) + value
    return sums


def _bars(
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
        "yaxis": _axis() | {"autorange": "reversed", "showgrid": False, "fixedrange": True},
        "bargap": 0.28,
        "margin": {"l": margin, "r": 4, "t": 2, "b": 2},
    }
    return _panel(name, title, note, label, BAR_HEIGHT * len(names) + 4, [trace], layout)


def _panel(
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


def _axis(*, nticks: int = 0, title: str = "") -> dict[str, Any]:
    return {
        "nticks": nticks,
        "title": {"text": title, "standoff": 2, "font": {"size": 12}},
        "gridcolor": "var(--rule)",
        "zeroline": False,
        "ticks": "",
        "ticklabelstandoff": 4,
    }


def _plotly(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'm3i-fast[eval]'") from error


def _binned(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return means of equal bins, at most MAX_POINTS of them."""
    size = math.ceil(len(values) / MAX_POINTS)
    edges = np.arange(0, len(values), size)
    return np.add.reduceat(values, edges) / np.diff(np.append(edges, len(values)))


def _moving_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Return the centred mean of finite values within `window` points, narrower at the ends."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), window // 2)
    start, end = index - reach, index + reach + 1
    number = count[end] - count[start]
    mean = (total[end] - total[start]) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)


def _trailing_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Return the mean of the finite values among the last `window`; 0 where there is none."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / np.maximum(count[end] - count[start], 1)


def _plain(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def _is_large(values: npt.NDArray[np.float64]) -> bool:
    return len(values) > 0 and float(np.abs(values).max()) >= 10_000


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
