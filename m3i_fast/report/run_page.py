"""One self-contained page that shows what a run learned, in pictures, figures and words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from m3i_fast.durable_files import write_atomically
from m3i_fast.report import pictures, verdict
from m3i_fast.report import plots as figures
from m3i_fast.report.inputs import (
    MixedPair,
    Nearest,
    PatchPca,
    Picture,
    ReportInputs,
    RetrievalRow,
)
from m3i_fast.report.template import render

__all__ = [
    "MixedPair",
    "Nearest",
    "PatchPca",
    "Picture",
    "ReportInputs",
    "RetrievalRow",
    "render_report",
    "write_report",
]

_HERE = Path(__file__).parent


def write_report(inputs: ReportInputs, path: Path) -> Path:
    """Write the page to `path`, replacing an older one whole, and return the path.

    Raises ImportError without plotly (the extra `eval`) and ValueError for inputs it cannot show.
    """
    write_atomically(path, render_report(inputs).encode())
    return path


def render_report(inputs: ReportInputs) -> str:
    """Return the page as HTML that makes no request: scripts, styles and pictures are inline."""
    return render(
        _HERE / "report.html",
        scripts=[_HERE / "report.js"],
        **_words(inputs),
        **_figures(inputs),
        **_pictures(inputs),
        config=list(_flat(inputs.config)),
        environment=list(_flat(inputs.environment)),
        plotly=Markup(figures.plotly_source()),
    )


def _words(inputs: ReportInputs) -> dict[str, Any]:
    judgements = verdict.judge(inputs.evaluation)
    return {
        "title": inputs.title,
        "summary": [*verdict.summary(judgements), *inputs.notes],
        "tiles": verdict.tiles(
            judgements,
            images_per_s=inputs.evaluation.get("train_images_per_s"),
            num_steps=int(inputs.metrics[-1]["step"]),
        ),
        "table": judgements + verdict.judge_more(inputs.evaluation),
        "chosen": _chosen(inputs.evaluation.get("chosen", {})),
        "gallery": inputs.evaluation["held_out_concepts"],
        "has_intervals": "trained_minus" in inputs.evaluation,
        "speed": _speed(inputs),
        "retrieval_choice": inputs.retrieval_choice,
        "attribution": inputs.attribution,
        "sources": verdict.SOURCES,
    }


def _figures(inputs: ReportInputs) -> dict[str, Any]:
    judgements = verdict.judge(inputs.evaluation)
    measures = [(judgement, figures.bars(judgement)) for judgement in judgements]
    shares_of_terms = figures.gradient_shares(inputs.metrics)
    losses = figures.curves(inputs.metrics, "loss")
    losses += [shares_of_terms] if shares_of_terms else []
    monitors = figures.curves(inputs.metrics, "monitor")
    shares = figures.time_shares(inputs.metrics)
    speeds = [shares] if shares else []
    for group in ("throughput", "bucket"):
        speeds += figures.curves(inputs.metrics, group)
    recall = figures.recall_curve(inputs.retrieval_ranks)
    panels = [panel for _, panel in measures] + losses + monitors + speeds + [recall]
    return {
        "measures": measures,
        "recall_curve": recall,
        "losses": losses,
        "monitors": monitors,
        "speeds": speeds,
        "drawn": figures.how_drawn(len(inputs.metrics)),
        "figures": {panel.id: panel.figure for panel in panels},
    }


def _pictures(inputs: ReportInputs) -> dict[str, Any]:
    num_right = Counter(
        who
        for row in inputs.retrieval
        for who, nearest in (("trained", row.trained), ("untrained", row.untrained))
        if nearest.right is not None
    )
    return {
        "pair": pictures.pair_pictures(inputs.mixed_pair),
        "captions": inputs.mixed_pair.captions,
        "categories": inputs.mixed_pair.categories,
        "view_name": _view_name,
        "retrieval": [pictures.retrieval_card(row) for row in inputs.retrieval],
        "num_right": {who: num_right[who] for who in ("trained", "untrained")},
        "pca": [pictures.pca_card(item) for item in inputs.patch_pca],
    }


def _view_name(number: int, view: str, box: pictures.Box) -> str:
    return f"view {view} of {number}" + (", mirrored" if box.mirrored else "")


def _speed(inputs: ReportInputs) -> str:
    steps = int(inputs.metrics[-1]["step"])
    where = inputs.environment.get("gpu") or inputs.environment.get("cpu")
    speed = inputs.evaluation.get("train_images_per_s")
    sentence = f"{steps:,} steps"
    if speed is not None:
        sentence += f" at {speed:,.0f} training images a second"
    return sentence + (f" on {where}." if where else ".")


def _chosen(chosen: Mapping[str, Mapping[str, float]]) -> str:
    """Return the chosen settings as `trained: knn k 20, linear l2 0.01; untrained: ...`."""
    return "; ".join(
        f"{verdict.SOURCES.get(source, source)}: "
        + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())
        for source, settings in chosen.items()
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as `a.b.c` and a value; items of a list go by their name."""
    for key, value in tree.items():
        if isinstance(value, Sequence) and value and all(isinstance(v, Mapping) for v in value):
            value = {item.get("name", str(i)): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    """Format a value: `0.707107` for a float, `none`, `true`, `0.9, 0.98` for a list."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return str(value)
