"""Curves over training: what a run logged, thinned to what a page can hold without losing a spike.

Legend: N logged values of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.observe.collapse import HealthyRange, healthy_range
from m3i_fast.observe.metrics import Curves
from m3i_fast.observe.stages import STAGES, family_of
from m3i_fast.report.evaluations.verdict import percent
from m3i_fast.report.panels import (
    CURVE_HEIGHT,
    LEGEND_HEIGHT,
    Panel,
    axis,
    bars_panel,
    legend,
    milliseconds,
    panel,
    plain,
)

Values = npt.NDArray[np.float64]  # [N]

MAX_BINS = 400  # of a curve: of more values each bin shows its lowest and its highest
MIN_SMOOTHED = 24  # values of a curve that gets a moving mean
LEGEND_LETTERS = 12  # of the longest name, where two stand in a row
NUM_COLOURS = 6  # --series-0 and on
WAITS = 0.1  # share of a step from which on the wait for data is worth a word
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
    "loss/caption_tokens": ("Caption's tokens", "cross-entropy over the vocabulary, a token"),
    "monitor/caption_tokens_accuracy": ("Tokens guessed", "share whose logit is the largest"),
    "loss/grounded_caption": ("Box, then text", "cross-entropy over the vocabulary, a token"),
    "monitor/grounded_caption_iou": ("Boxes guessed", "mean IoU, each coordinate after the others"),
    "loss/referring_box": ("Text, then box", "cross-entropy over the vocabulary, a token"),
    "monitor/referring_box_iou": ("Boxes of texts", "mean IoU, each coordinate after the others"),
    "optim/lr": ("Learning rate", "as scheduled"),
    "optim/grad_norm": ("Gradient norm", "before clipping"),
    "throughput/img_s": ("Throughput", "training images a second"),
    "throughput/tokens_s": ("Tokens", "patches of training views a second"),
    "batch/images": ("Images of a batch", "mean of a rank's batches, of views of any shape"),
    "batch/tokens": ("Tokens of a batch", "mean of a rank's batches, of views of any shape"),
    "optim/ema_momentum": ("Momentum of the average", "as scheduled"),
    "efficiency/mfu": ("MFU", "share of the card's peak that the model uses"),
    "efficiency/hfu": ("HFU", "with what is computed again"),
    "efficiency/tflop_s": ("Model TFLOP/s", "of a rank"),
    "efficiency/joule_per_image": ("Energy an image", "joule"),
    "memory/peak_gib": ("Peak memory", "GiB of a card"),
    "evaluate/knn_top1": ("kNN", "share of classes that 20 neighbours get right"),
    "evaluate/knn_top1_ema": ("kNN of the average", "the moving average of the encoder"),
    "evaluate/classifier_top1": ("Classifier, top 1", "share of classes that it gets right"),
    "evaluate/classifier_top5": ("Classifier, top 5", "share of classes among its first five"),
    "evaluate/zero_shot_top1": ("Zero-shot", "share of classes that prompts get right"),
    "evaluate/caption_to_image_recall_at_1": ("Caption to picture, top 1", "share found"),
    "evaluate/caption_to_image_recall_at_5": ("Caption to picture, top 5", "share found"),
    "evaluate/image_to_caption_recall_at_1": ("Picture to caption, top 1", "share found"),
    "evaluate/image_to_caption_recall_at_5": ("Picture to caption, top 5", "share found"),
    "evaluate/seconds": ("Time of an evaluation", "seconds, not in the throughput"),
    "bucket/read_gib": ("Read from the bucket", "GiB between two logged steps, all ranks"),
    "bucket/requests": ("Requests", "ranged reads between two logged steps, repeated ones too"),
    "bucket/retries": ("Repeated requests", "between two logged steps"),
    "bucket/wait_s": ("Wait for the bucket", "seconds of a rank between two logged steps"),
    "bucket/cache_hits": ("Found in the cache", "clumps between two logged steps"),
    "bucket/cache_gib": ("Read from the cache", "GiB between two logged steps"),
}


def curves(logged: Curves, group: str) -> list[Panel]:
    """Return a panel for every curve `group/...` that was logged, known ones first."""
    keys = {key for key in logged if key.startswith(f"{group}/")}
    known = [key for key in NAMES if key in keys]
    return [curve(key, *logged[key]) for key in known + sorted(keys - set(known))]


def how_drawn(num_values: int) -> str:
    """Return a sentence on how a curve of so many logged values is drawn."""
    size = math.ceil(num_values / MAX_BINS)
    points = "Every logged step"
    if size > 1:
        points = f"The lowest and the highest value of every {size:,} logged steps"
    return (
        f"{points} (thin) and a moving mean (bold)." if num_values >= MIN_SMOOTHED else f"{points}."
    )


def curve(key: str, steps: Values, values: Values) -> Panel:
    """Return the curve of one key with a moving mean; values that are not finite are gaps.

    Dashed lines are the bounds of the healthy range, where one is known.
    """
    title, note = NAMES.get(key, (key.split("/", 1)[1].replace("_", " "), ""))
    bounds = healthy_range(key)
    if bounds:
        note += f"; healthy: {bounds.text}" if note else f"healthy: {bounds.text}"
    x, y = thinned(steps, values)
    line: dict[str, Any] = {"type": "scatter", "showlegend": False}
    line["mode"] = "lines" if len(x) > 2 else "lines+markers"
    many = len(values) >= MIN_SMOOTHED
    traces = [
        line
        | {
            "x": plain(x),
            "y": plain(y),
            "line": {"color": "var(--accent)", "width": 1 if many else 2},
            "opacity": 0.4 if many else 1,
            "hovertemplate": "step %{x:,d}: %{y:.4~g}<extra></extra>",
        }
    ]
    if many:
        means = _binned(values)
        smooth = _moving_mean(means, window=max(len(means) // 12, 1))
        accent = {"color": "var(--accent)", "width": 2}
        bold = {"x": plain(_binned(steps)), "y": plain(smooth), "line": accent}
        traces.append(line | bold | {"hoverinfo": "skip"})
    finite = values[np.isfinite(values)]
    label = f"{title}: no finite value was logged"
    if len(finite):
        label = (
            f"{title} from {finite[0]:.4g} to {finite[-1]:.4g} over {len(values):,} logged steps"
        )
    layout = {
        "xaxis": axis(nticks=4, title="step") | {"showgrid": False},
        "yaxis": axis(nticks=4) | {"tickformat": "~s" if _is_large(finite) else "~g"},
        "shapes": _bounds(bounds) if bounds else [],
        "hovermode": "x",
        "margin": {"l": 38, "r": 12, "t": 8, "b": 40},
    }
    return panel(key.replace("/", "-"), title, note, label, CURVE_HEIGHT, traces, layout)


def thinned(
    steps: Values, values: Values, *, max_bins: int = MAX_BINS
) -> tuple[Values, Values]:  # [n], [n]
    """Return the first, the last, and of each of at most `max_bins` bins the extreme values.

    A bin that holds a value that is not finite keeps one of those, too, which is drawn as a gap.
    """
    number = len(values)
    size = math.ceil(number / max_bins)
    if size == 1:
        return steps, values
    places = np.arange(-(-number // size) * size).reshape(-1, size)
    padded = np.pad(values, (0, places.size - number)).reshape(places.shape)
    is_there = places < number
    finite = np.isfinite(padded) & is_there
    lost = is_there & ~finite
    chosen = [
        places[finite.any(1), np.where(finite, padded, np.inf).argmin(1)[finite.any(1)]],
        places[finite.any(1), np.where(finite, padded, -np.inf).argmax(1)[finite.any(1)]],
        places[lost.any(1), lost.argmax(1)[lost.any(1)]],
        np.array([0, number - 1]),
    ]
    kept = np.unique(np.concatenate(chosen))
    return steps[kept], values[kept]


def gradient_shares(logged: Curves) -> Panel | None:
    """Return each term's share of all terms' gradients on the encoder, as a stacked area.

    Shares are means over the logged steps before, since a term that few pictures have targets for
    has a gradient in few steps. None where there is a single term or no gradient was logged.
    """
    steps, shares = _shares_of_terms(logged)
    if len(shares) < 2:
        return None
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"{name} {_share(share[-1])}",
            "x": plain(steps),
            "y": plain(share),
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
        "xaxis": axis(nticks=4, title="step") | {"showgrid": False},
        "yaxis": axis(nticks=4) | {"range": [0, 1], "tickformat": ".0%", "fixedrange": True},
        "hovermode": "x unified",
        "legend": legend(in_a_row),
        "margin": {"l": 38, "r": 12, "t": top, "b": 40},
    }
    return panel(
        "gradient-shares",
        "Pull on the encoder",
        "each term's share of the gradient, smoothed; under 1% a term has almost no effect",
        f"Share of the gradient at the last logged steps: {listed}",
        CURVE_HEIGHT + top,
        traces,
        layout,
    )


def _shares_of_terms(logged: Curves) -> tuple[Values, dict[str, Values]]:
    """Return the logged steps, binned, and each term's share of all terms' gradients there."""
    prefix = "gradient/"
    norms = {key: curve for key, curve in logged.items() if key.startswith(prefix)}
    last = max((steps[-1] for steps, _ in norms.values()), default=0.0)
    norms = {key: curve for key, curve in norms.items() if curve[0][-1] == last}
    if not norms:
        return np.zeros(0), {}
    every = [steps for steps, _ in norms.values()]
    common = every[0]
    for steps in every[1:]:
        common = np.intersect1d(common, steps)
    binned = _binned(common)
    pulls = [
        _trailing_mean(_binned(values[np.isin(steps, common)]), max(len(binned) // 6, 1))
        for steps, values in norms.values()
    ]
    total = np.maximum(sum(pulls, start=np.zeros(len(binned))), 1e-30)
    names = [key.removeprefix(prefix) for key in norms]
    return binned, {name: pull / total for name, pull in zip(names, pulls, strict=True)}


def _share(value: float) -> str:
    """Format a share for a legend, with a decimal where it is small."""
    return percent(value) if value < 0.1 else f"{100 * value:.0f}%"


def _bounds(bounds: HealthyRange) -> list[dict[str, Any]]:
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1}
    dashed = {"line": {"color": "var(--muted)", "width": 1, "dash": "dash"}}
    finite = [bound for bound in (bounds.low, bounds.high) if math.isfinite(bound)]
    return [line | dashed | {"y0": bound, "y1": bound} for bound in finite]


def time_shares(logged: Curves) -> Panel | None:
    """Return the median time of each stage over the logged steps, and its share of a step."""
    median = stage_medians(logged)
    total = sum(median.values())
    if total <= 0:
        return None
    names = [STAGES[key] for key in median]
    texts = [f"{100 * ms / total:.0f}%, {milliseconds(ms)}" for ms in median.values()]
    label = "Time of a step: " + ", ".join(map(" ".join, zip(names, texts, strict=True)))
    return bars_panel(
        "time-shares",
        "Time of a step",
        f"{milliseconds(total)}, medians over the logged steps",
        label,
        names,
        list(median.values()),
        texts,
        ["var(--accent)"] * len(names),
        margin=116,
        room=2.0,
    )


def stage_medians(logged: Curves) -> dict[str, float]:
    """Return the median milliseconds of each stage that was logged, those of terms summed."""
    sums: dict[str, float] = {}
    for key, (_, values) in logged.items():
        if key.startswith("time/") and len(values):
            stage = family_of(key.removeprefix("time/").removesuffix("_ms"))
            sums[stage] = sums.get(stage, 0.0) + float(np.median(values))
    return {stage: sums[stage] for stage in STAGES if stage in sums}


def what_bounds(medians: Mapping[str, float]) -> str:
    """Return a sentence on what bounds the speed, from `stage_medians`; empty without any."""
    total = sum(medians.values())
    if total <= 0:
        return ""
    waited = medians.get("data.wait", 0.0) / total
    slowest = max((s for s in medians if s != "data.wait"), key=medians.__getitem__, default="")
    longest = f"{STAGES[slowest]} takes {percent(medians[slowest] / total)}" if slowest else ""
    if waited >= WAITS:
        return (
            f"Waiting for the loader takes {percent(waited)} of a step: it bounds the speed, and "
            f"--data.num-threads or a faster store helps; of the rest {longest}."
        )
    return (
        f"The model bounds the speed: {longest} of a step, waiting for the loader "
        f"{percent(waited)}."
    )


def _binned(values: Values) -> Values:
    """Return means of the finite values of equal bins, at most MAX_BINS of them; NaN of none."""
    size = math.ceil(len(values) / MAX_BINS)
    edges = np.arange(0, len(values), size)
    finite = np.isfinite(values)
    total = np.add.reduceat(np.where(finite, values, 0.0), edges)
    count = np.add.reduceat(finite.astype(np.int64), edges)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _moving_mean(values: Values, window: int) -> Values:
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


def _trailing_mean(values: Values, window: int) -> Values:
    """Return the mean of the finite values among the last `window`; 0 where there is none."""
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / np.maximum(count[end] - count[start], 1)


def _is_large(values: Values) -> bool:
    return len(values) > 0 and float(np.abs(values).max()) >= 10_000
