"""One self-contained page that shows what an evaluation on pictures found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from m3i_fast.durable_files import write_atomically
from m3i_fast.report import template
from m3i_fast.report.evaluations.class_figures import class_figures
from m3i_fast.report.evaluations.examples import patch_cards, retrieval_sides, short_names
from m3i_fast.report.evaluations.verdict import Tile, percent, points
from m3i_fast.report.inputs import DataEvaluation
from m3i_fast.report.panels import Panel, plotly_source
from m3i_fast.report.sample_card import printable
from m3i_fast.report.settings_list import flat

STYLES = (Path(__file__).parent / "parts.css",)
MOST_TILES = 4
MOST_NAMED = 5
# The figure of a measure that stands at the top, those first that a reader asks for first.
HEADLINES = {
    "knn": ("k = 20", "nearest neighbours, top 1"),
    "linear": ("top 1", "linear classifier, top 1"),
    "fine-tuning": ("top 1", "fine-tuned, top 1"),
    "zero-shot": ("top 1", "zero-shot, top 1"),
    "retrieval": ("caption to picture, recall at 5", "captions whose picture is among five"),
    "attentive": ("top 1", "attentive probe, top 1"),
    "few-labels": ("10%", "from a tenth of the labels"),
    "segmentation": ("mean IoU", "segmentation, mean IoU"),
    "correspondence": ("patches found", "patches found in another crop"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationParts:
    """What parts.html shows of an evaluation."""

    id: str
    folder: str
    title: str
    summary: Sequence[str]
    tiles: Sequence[Tile]
    model: str
    baselines: Sequence[str]
    table: Sequence[Sequence[Mapping[str, Any]]]
    not_measured: Sequence[str]
    classes: Sequence[Panel]
    retrieval: Sequence[Mapping[str, Any]]
    patches: Sequence[Mapping[str, Any]]
    protocols: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]


def write_evaluation_page(evaluation: DataEvaluation, path: Path) -> Path:
    """Write the page to `path`, replacing an older one whole, and return the path.

    Raises ImportError without plotly (the extra `eval`).
    """
    write_atomically(path, render_evaluation_page(evaluation).encode())
    return path


def render_evaluation_page(evaluation: DataEvaluation) -> str:
    """Return the page as HTML that makes no request: scripts, styles and pictures are inline."""
    found = parts(evaluation, prefix="evaluation")
    return template.render(
        Path(__file__).parent / "page.html",
        styles=STYLES,
        scripts=[Path(template.__file__).parent / "report.js"],
        title=found.title,
        summary=found.summary,
        tiles=found.tiles,
        e=found,
        figures={panel.id: panel.figure for panel in found.classes},
        plotly=Markup(plotly_source()),
    )


def parts(evaluation: DataEvaluation, *, prefix: str) -> EvaluationParts:
    """Return what the page of an evaluation shows. prefix: of the ids of its figures."""
    results = evaluation.results
    data = results["data"]
    model, *baselines = names = short_names(results["encoders"])
    return EvaluationParts(
        id=prefix,
        folder=printable(evaluation.name),
        title=printable(f"Evaluation of {model} on {data['path']}"),
        summary=[*_counted(results), *_compared(results, baselines)],
        tiles=_tiles(results, baselines),
        model=model,
        baselines=baselines,
        table=_table(results),
        not_measured=[
            printable(f"{name}: not measured: {measure}: {reason}")
            for name, encoder in zip(names, results["encoders"], strict=True)
            for measure, reason in encoder.get("not_measured", {}).items()
        ],
        classes=class_figures(evaluation, prefix=prefix),
        retrieval=retrieval_sides(evaluation),
        patches=patch_cards(evaluation),
        protocols=list(_protocols(results)),
        settings=[(key, printable(text)) for key, text in _settings(results)],
    )


# ---- Words ---------------------------------------------------------------------------------------


def _counted(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was measured on what, and what is wrong with it."""
    data = results["data"]
    measured, train = data["measured"], data["train"]
    counts = f"{measured['labelled']:,} with one of {data['classes']:,} classes"
    if measured["captions"]:
        counts += f", {measured['captioned']:,} with a caption"
    if measured["captions"] > measured["captioned"]:
        counts += f" ({measured['captions']:,} captions)"
    yield printable(
        f"Measured on {measured['rows']:,} pictures of split {measured['split']} of "
        f"{data['path']}: {counts}."
    )
    if train is not None:
        yield printable(
            f"Classifiers are fitted to {train['labelled']:,} pictures of split {train['split']}."
        )
    yield f"Digest of what was measured: {measured['digest'][:16]}."
    if broken := results.get("broken"):
        yield f"{len(broken):,} pictures could not be decoded and are left out: {_some(broken)}."
    if shared := results.get("pictures_also_in_train"):
        names = [ours for ours, _ in shared]
        yield (
            f"{len(names):,} measured pictures are also among those fitted to, byte for byte: "
            f"{_some(names)}."
        )


def _compared(results: Mapping[str, Any], baselines: Sequence[str]) -> Iterator[str]:
    """Yield a sentence a baseline: in how many figures the model is better, worse or neither."""
    for other, of_other in zip(baselines, results["comparisons"].values(), strict=True):
        if of_other:
            verdicts = Counter(interval["verdict"] for interval in of_other.values())
            said = "; ".join(f"{verdict} in {number}" for verdict, number in verdicts.most_common())
            yield (f"Against {other}, of {len(of_other)} figures: {said}.")


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    shown = ", ".join([*names][:MOST_NAMED])
    return printable(shown + (", ..." if len(names) > MOST_NAMED else ""))


def _tiles(results: Mapping[str, Any], baselines: Sequence[str]) -> list[Tile]:
    model, *others = results["encoders"]
    tiles = []
    for measure, (wanted, label) in HEADLINES.items():
        figures = _figures(model, measure)
        figure = wanted if wanted in figures else next(iter(figures), None)
        if figure is None:
            continue
        beside = [
            f"{name} {percent(_figures(other, measure)[figure])}"
            for name, other in zip(baselines, others, strict=True)
            if figure in _figures(other, measure)
        ]
        detail = ", ".join(beside) or figure
        tiles.append(Tile(percent(figures[figure]), label, detail))
    return tiles[:MOST_TILES]


def _figures(encoder: Mapping[str, Any], measure: str) -> Mapping[str, float]:
    figures: Mapping[str, float] = encoder["measures"].get(measure, {}).get("figures", {})
    return figures


def _protocols(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, (measured, _) in _measures(results).items():
        yield measured.get("title", name), f"{measured['protocol']} ({measured['paper']})"


def _settings(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from flat({"data": results["data"], "settings": results.get("settings", {})})
    for encoder in results["encoders"]:
        step = encoder.get("step")  # earlier results have none
        of_step = "" if step is None else f"step {step}, "
        yield encoder["name"], f"{of_step}{encoder['dtype']}, sha256 {encoder['digest']}"
        for measure, measured in encoder["measures"].items():
            yield from flat(measured["settings"], f"{encoder['name']}, {measure}: ")


# ---- The table -----------------------------------------------------------------------------------


def _table(results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Return a row for every figure that any encoder has, measure by measure."""
    model, *others = results["encoders"]
    table = []
    for measure, (measured, figures) in _measures(results).items():
        own = model["measures"].get(measure, {})
        table.append(
            [
                {
                    "title": f"{measured.get('title', measure)}, {figure}",
                    "value": _percent(own.get("figures", {}).get(figure)),
                    "interval": _interval(own.get("intervals", {}).get(figure)),
                    "cells": [_cell(results, other, measure, figure) for other in others],
                }
                for figure in figures
            ]
        )
    return table


def _measures(results: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], dict[str, None]]]:
    """Return what the first encoder that has it says of each measure, and all of its figures."""
    found: dict[str, tuple[Mapping[str, Any], dict[str, None]]] = {}
    for encoder in results["encoders"]:
        for name, measured in encoder["measures"].items():
            found.setdefault(name, (measured, {}))[1].update(dict.fromkeys(measured["figures"]))
    return found


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{percent(ends[0])} to {percent(ends[1])}"


def _cell(
    results: Mapping[str, Any], other: Mapping[str, Any], measure: str, figure: str
) -> dict[str, str]:
    value = _figures(other, measure).get(figure)
    found = results["comparisons"].get(other["name"], {}).get(f"{measure}: {figure}")
    if found is None:
        is_lone = value is None or figure not in _figures(results["encoders"][0], measure)
        verdict = "" if is_lone else "not compared"
        return {"value": _percent(value), "difference": "", "verdict": verdict}
    ends = f"({points(found['low'])} to {points(found['high'])})"
    return {
        "value": _percent(value),
        "difference": f"{points(found['difference'], sign=True)} {ends}",
        "verdict": found["verdict"].removesuffix(" found"),
    }
