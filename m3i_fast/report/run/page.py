"""One self-contained page that shows what a run learned, in pictures, figures and words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from m3i_fast.durable_files import write_atomically
from m3i_fast.observe.metrics import Curves
from m3i_fast.report import pictures, template
from m3i_fast.report.evaluations import page as evaluation_page
from m3i_fast.report.evaluations import verdict
from m3i_fast.report.evaluations.plots import (
    confidences,
    confusion_matrix,
    reliability_diagram,
    retrieval_sheet,
)
from m3i_fast.report.inputs import (
    MixedPair,
    Nearest,
    Neighbours,
    PatchPca,
    Picture,
    ReportInputs,
    RetrievalRow,
    SeenInput,
)
from m3i_fast.report.panels import Panel, plotly_source
from m3i_fast.report.run import curves as curve_plots
from m3i_fast.report.run import figures
from m3i_fast.report.sample_card import printable, sample_card
from m3i_fast.report.settings_list import flat, setting_text

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

_HERE, _SHARED = Path(__file__).parent, Path(template.__file__).parent
# Sections of the page with curves, and the groups of logged names that each shows.
GROUPS = {
    "evaluations": ("evaluate",),
    "losses": ("loss",),
    "norms": ("optim",),
    "monitors": ("monitor",),
    "speeds": ("throughput", "batch", "efficiency", "memory", "bucket"),
}
# Last values that stand at the top of a run without evaluation.json.
TILES = ("loss/total", "evaluate/knn_top1", "evaluate/caption_to_image_recall_at_5")


def write_report(inputs: ReportInputs, path: Path) -> Path:
    """Write the page to `path`, replacing an older one whole, and return the path.

    Raises ImportError without plotly (the extra `eval`) and ValueError for inputs it cannot show.
    """
    write_atomically(path, render_report(inputs).encode())
    return path


def render_report(inputs: ReportInputs) -> str:
    """Return the page as HTML that makes no request: scripts, styles and pictures are inline."""
    on_data = [
        evaluation_page.parts(evaluation, prefix=f"data-{evaluation.name}")
        for evaluation in inputs.data_evaluations
    ]
    return template.render(
        _HERE / "page.html",
        styles=[_SHARED / "sample_card.css", *evaluation_page.STYLES],
        scripts=[_SHARED / "report.js"],
        **_words(inputs),
        **_figures(inputs, [panel for each in on_data for panel in each.classes]),
        data_evaluations=on_data,
        **_pictures(inputs),
        config=list(flat(inputs.config)),
        changed=[
            (name, setting_text(usual), setting_text(own)) for name, usual, own in inputs.changed
        ],
        recipe=inputs.recipe,
        environment=list(flat(inputs.environment)),
        data=list(flat(inputs.data)),
        initial_weights=list(flat(inputs.initial_weights)),
        absent={key: printable(reason) for key, reason in inputs.absent.items()},
        plotly=Markup(plotly_source()),
    )


def _words(inputs: ReportInputs) -> dict[str, Any]:
    evaluation = inputs.evaluation or {}
    judgements = verdict.judge(evaluation) if evaluation else []
    captions = len(next(iter(inputs.retrieval_ranks.values()), ()))
    return {
        "title": inputs.title,
        "summary": [*inputs.notes, *verdict.summary(judgements)],
        "tiles": _tiles(inputs, judgements),
        "table": judgements + verdict.judge_more(evaluation),
        "chosen": _chosen(evaluation.get("chosen", {})),
        "num_held_out": evaluation.get("held_out_concepts"),
        "gallery": captions,
        "scheduled": _scheduled(inputs.curves),
        "has_intervals": "trained_minus" in evaluation,
        "speed": _speed(inputs),
        "retrieval_choice": inputs.retrieval_choice,
        "attribution": inputs.attribution,
        "sources": verdict.SOURCES,
        "has_untrained": any(row.untrained is not None for row in inputs.retrieval)
        or any(item.untrained is not None for item in inputs.patch_pca),
    }


def _tiles(inputs: ReportInputs, judgements: list[verdict.Judgement]) -> list[verdict.Tile]:
    """Return the headline numbers: those of an evaluation, or else the last logged ones."""
    speed = _images_per_s(inputs)
    tiles = verdict.tiles(judgements, images_per_s=speed, num_steps=inputs.num_steps)
    if judgements:
        return tiles
    shown = []
    for key in TILES:
        if key in inputs.curves:
            steps, values = inputs.curves[key]
            text = f"{values[-1]:.4g}" if key.startswith("loss") else verdict.percent(values[-1])
            title, note = curve_plots.NAMES[key]
            shown.append(verdict.Tile(text, title, f"{note}, step {int(steps[-1]):,}"))
    return shown + tiles


def _scheduled(curves: Curves) -> str:
    """Return what was evaluated while the run trained, and at which steps; empty without any."""
    steps = [steps for key, (steps, _) in curves.items() if key.startswith("evaluate/")]
    if not steps:
        return ""
    at = np.unique(np.concatenate(steps)).astype(int).tolist()
    when = f"step {at[0]:,}" if len(at) == 1 else f"{len(at):,} steps from {at[0]:,} to {at[-1]:,}"
    return (
        f"The live model at {when}, by weighted kNN on classes and by retrieval of captions, on "
        "the split that --evaluate-split names."
    )


def _images_per_s(inputs: ReportInputs) -> float | None:
    """Return the images a second of an evaluation's file, or over the logged rows but the first."""
    told = (inputs.evaluation or {}).get("train_images_per_s")
    if told is not None:
        return float(told)
    _, rates = inputs.curves.get("throughput/img_s", (None, np.zeros(0)))
    rates = rates[rates > 0]
    rates = rates[1:] if len(rates) > 1 else rates
    return float(len(rates) / (1 / rates).sum()) if len(rates) else None


def _figures(inputs: ReportInputs, others: list[Panel]) -> dict[str, Any]:
    """Return the figures of the page. others: those that are drawn elsewhere."""
    judgements = verdict.judge(inputs.evaluation) if inputs.evaluation else []
    curves = inputs.curves
    groups = {
        name: [panel for group in of for panel in curve_plots.curves(curves, group)]
        for name, of in GROUPS.items()
    }
    measures = [(judgement, figures.bars(judgement)) for judgement in judgements]
    terms = curve_plots.gradient_shares(curves)
    groups["losses"] += [terms] if terms else []
    stages = curve_plots.time_shares(curves)
    groups["speeds"] = ([stages] if stages else []) + groups["speeds"]
    recall = figures.recall_curve(inputs.retrieval_ranks) if inputs.retrieval_ranks else None
    classes = []
    if (guesses := inputs.guesses) is not None:
        predicted = guesses.logits.argmax(1)
        classes = [
            confusion_matrix(predicted, guesses.label, guesses.class_names),
            reliability_diagram(*confidences(guesses.logits, guesses.label)),
        ]
    panels = [panel for _, panel in measures] + classes + sum(groups.values(), others)
    panels += [recall] if recall else []
    longest = max((len(steps) for steps, _ in curves.values()), default=0)
    return {
        "measures": measures,
        "recall_curve": recall,
        "class_figures": classes,
        **groups,
        "drawn": curve_plots.how_drawn(longest) if longest else "",
        "figures": {panel.id: panel.figure for panel in panels},
    }


def _pictures(inputs: ReportInputs) -> dict[str, Any]:
    num_right = Counter(
        who
        for row in inputs.retrieval
        for who, nearest in (("trained", row.trained), ("untrained", row.untrained))
        if nearest is not None and nearest.right is not None
    )
    pair = inputs.mixed_pair
    return {
        "pair": None if pair is None else pictures.pair_pictures(pair),
        "captions": () if pair is None else pair.captions,
        "categories": () if pair is None else pair.categories,
        "view_name": _view_name,
        "seen": [_seen(shown) for shown in inputs.seen],
        "retrieval": [pictures.retrieval_card(row) for row in inputs.retrieval],
        "num_right": {who: num_right[who] for who in ("trained", "untrained")},
        "neighbours": _sheet(inputs.neighbours),
        "pca": [pictures.pca_card(item) for item in inputs.patch_pca],
    }


def _seen(shown: SeenInput) -> dict[str, Any]:
    encode = pictures.photo if shown.encoded.shape[-1] == 3 else pictures.inline
    return {
        "samples": [sample_card(sample) for sample in shown.samples],
        "encoded": encode(shown.encoded, f"What the encoder reads. {shown.told}"),
        "told": shown.told,
    }


def _sheet(neighbours: Neighbours | None) -> dict[str, Any] | None:
    if neighbours is None:
        return None
    found = neighbours.is_right
    sheet = retrieval_sheet(
        neighbours.pictures, neighbours.queries, neighbours.found, neighbours.is_right
    )
    told = f"{int(found.sum())} of {found.size} neighbours have the class of their picture"
    rows = [f"row {i}: {int(row.sum())} of {row.size} right" for i, row in enumerate(found, 1)]
    return {"picture": pictures.photo(sheet, f"{told}; {', '.join(rows)}"), "told": told}


def _view_name(number: int, view: str, box: pictures.Box) -> str:
    return f"view {view} of {number}" + (", mirrored" if box.mirrored else "")


def _speed(inputs: ReportInputs) -> list[str]:
    where = inputs.environment.get("gpu") or inputs.environment.get("cpu")
    speed = _images_per_s(inputs)
    sentence = f"{inputs.num_steps:,} steps"
    if speed is not None:
        sentence += f" at {speed:,.0f} training images a second"
    told = [sentence + (f" on {where}." if where else ".")]
    bound = curve_plots.what_bounds(curve_plots.stage_medians(inputs.curves))
    seconds = inputs.curves.get("evaluate/seconds")
    if bound:
        told.append(bound)
    if seconds is not None:
        told.append(
            f"{len(seconds[1]):,} evaluations took {seconds[1].sum():,.0f} s in all, which is in "
            "no other figure."
        )
    return told + list(inputs.speed_notes)


def _chosen(chosen: Mapping[str, Mapping[str, float]]) -> str:
    """Return the chosen settings as `trained: knn k 20, linear l2 0.01; untrained: ...`."""
    return "; ".join(
        f"{verdict.SOURCES.get(source, source)}: "
        + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())
        for source, settings in chosen.items()
    )
