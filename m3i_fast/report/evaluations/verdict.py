"""Judges the figures of an evaluation in words, all of which are derived from the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

MINUS = "\N{MINUS SIGN}"
SOURCES = {
    "trained": "trained",
    "ema": "its EMA",
    "untrained": "untrained",
    "pixels": "raw pixels",
    "chance": "chance",
}
OPPONENTS = {
    "untrained": "the untrained encoder",
    "pixels": "raw pixels",
    "chance": "chance",
}


def percent(fraction: float) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * fraction:.1f}%"


def nats(value: float) -> str:
    """Format a value in nats."""
    return f"{round(value, 2) + 0.0:.2f} nats".replace("-", MINUS)  # no negative zero


def dimensions(value: float) -> str:
    """Format an effective rank."""
    return f"{value:.1f}"


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure's title, meaning and number format."""

    title: str
    meaning: str
    text: Callable[[float], str] = percent


MEASURES = {
    "caption_to_image_recall_at_5": Measure(
        "Caption to picture, top 5",
        "held-out captions whose picture is among the five nearest",
    ),
    "caption_to_image_recall_at_1": Measure(
        "Caption to picture, top 1", "held-out captions whose picture is the nearest"
    ),
    "image_to_caption_recall_at_5": Measure(
        "Picture to caption, top 5",
        "held-out pictures whose caption is among the five nearest",
    ),
    "knn_top1": Measure("Category by kNN", "held-out pictures whose category kNN gets right"),
    "linear_top1": Measure(
        "Category by linear probe",
        "held-out pictures whose category logistic regression gets right",
    ),
    "patch_correspondence_centred": Measure(
        "Same place in another crop",
        "patches of a held-out picture that the most similar patch of another crop places right, "
        "what the position in the crop says taken out",
    ),
    "few_label_top1": Measure(
        "Category from few labels",
        "held-out pictures that logistic regression gets right from five concepts a category",
    ),
    "scene_miou": Measure(
        "Category of a patch",
        "mean IoU over the categories, of patches in scenes of four held-out drawings",
    ),
}
MORE_MEASURES = {
    "knn_balanced_accuracy": Measure("kNN, balanced accuracy", "mean over the categories"),
    "linear_balanced_accuracy": Measure(
        "Linear probe, balanced accuracy", "mean over the categories"
    ),
    "few_label_knn_top1": Measure("Category from few labels, kNN", "from five concepts a category"),
    "scene_patch_top1": Measure(
        "Category of a patch, accuracy", "patches of scenes, each held-out concept counting once"
    ),
    "caption_information_nats": Measure(
        "Information of picture and caption",
        "lower bound from the held-out pairs, at most the log of half their number",
        nats,
    ),
    "effective_rank": Measure(
        "Effective rank of features", "RankMe of the held-out pictures", dimensions
    ),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The trained encoder against one opponent; differences are fractions of 1."""

    source: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None = None
    """p-value, corrected for all comparisons; None in evaluations from before it was computed."""

    @property
    def verdict(self) -> str:
        """Return better or worse where the interval excludes zero and the p-value is below 0.05."""
        if self.low is None or self.high is None:
            if self.difference == 0:
                return "equal, no interval computed"
            return f"{'higher' if self.difference > 0 else 'lower'}, no interval computed"
        if (self.p_value or 0.0) >= 0.05:
            return "no difference found"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference found"

    @property
    def mark(self) -> str:
        """Return the verdict for a narrow table cell; empty where no interval was computed."""
        if self.low is None:
            return ""
        return self.verdict.removesuffix(" found")

    @property
    def text(self) -> str:
        """Return the difference in points, with its interval."""
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f" ({points(self.low)} to {points(self.high)})"
        return points(self.difference, sign=True) + interval


@dataclass(frozen=True, slots=True)
class Judgement:
    """One measure: every source's value, and the trained encoder against each of the others."""

    name: str
    title: str
    meaning: str
    values: dict[str, float]  # source -> value, in the order of SOURCES; of MEASURES fractions of 1
    shown: dict[str, str]  # source -> the value in its unit
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline number."""

    value: str
    label: str
    detail: str


def judge(evaluation: Mapping[str, Any]) -> list[Judgement]:
    """Return every headline measure of evaluation.json.

    Raises ValueError when it has none of them, or one without `trained`.
    """
    judged = [_judge(name, MEASURES[name], evaluation) for name in MEASURES if name in evaluation]
    if not judged:
        raise ValueError(
            f"evaluation: expected one of {', '.join(MEASURES)}, got {sorted(evaluation)}"
        )
    return judged


def judge_more(evaluation: Mapping[str, Any]) -> list[Judgement]:
    """Return the measures that only the table shows, those on the hard half of the items last."""
    hard = {f"{name}_hard": _hard(measure) for name, measure in (MEASURES | MORE_MEASURES).items()}
    more = MORE_MEASURES | hard
    return [_judge(name, more[name], evaluation) for name in more if name in evaluation]


def summary(judgements: Sequence[Judgement]) -> list[str]:
    """Return one sentence an opponent: where the trained encoder is better, worse or neither."""
    sentences = []
    for source, opponent in OPPONENTS.items():
        groups: dict[str, list[str]] = {}
        for judgement in judgements:
            for comparison in judgement.comparisons:
                if comparison.source == source:
                    groups.setdefault(comparison.verdict, []).append(judgement.title)
        if not groups:
            continue
        total = sum(map(len, groups.values()))
        clauses = [
            f"{verdict} in {_enumerate(titles, total)}"
            for verdict, titles in sorted(groups.items())
        ]
        sentences.append(f"Against {opponent}: {'; '.join(clauses)}.")
    return sentences


def tiles(
    judgements: Sequence[Judgement], *, images_per_s: float | None, num_steps: int
) -> list[Tile]:
    """Return the headline numbers: retrieval, categories, throughput."""
    wanted = ("caption_to_image_recall_at_5", "knn_top1", "linear_top1")
    by_name = {judgement.name: judgement for judgement in judgements}
    result = [
        Tile(
            percent(by_name[name].values["trained"]),
            by_name[name].meaning,
            _beside(by_name[name].values, ratio="recall" in name),
        )
        for name in wanted
        if name in by_name
    ]
    if images_per_s is not None:
        speed = f"{images_per_s:,.0f}"
        result.append(Tile(speed, "training images a second", f"over {num_steps:,} steps"))
    return result


def points(fraction: float, *, sign: bool = False) -> str:
    """Format a difference of fractions in percentage points, with a real minus sign."""
    value = round(100 * fraction, 1) + 0.0  # no negative zero
    return f"{value:{'+' if sign else ''}.1f}".replace("-", MINUS)


def _hard(measure: Measure) -> Measure:
    where = "on the half of the held-out pictures that lies farthest from any training picture"
    return replace(
        measure, title=f"{measure.title}, hard half", meaning=f"{measure.meaning}, {where}"
    )


def _judge(name: str, measure: Measure, evaluation: Mapping[str, Any]) -> Judgement:
    figures = evaluation[name]
    if "trained" not in figures:
        raise ValueError(f"evaluation.{name}: expected 'trained', got {sorted(figures)}")
    values = {source: float(figures[source]) for source in SOURCES if source in figures}
    intervals = evaluation.get("trained_minus", {}).get(name, {})
    comparisons = tuple(
        Comparison(
            source,
            values["trained"] - value,
            intervals[source]["low"] if source in intervals else None,
            intervals[source]["high"] if source in intervals else None,
            intervals.get(source, {}).get("p_value"),
        )
        for source, value in values.items()
        if source != "trained"
    )
    shown = {source: measure.text(value) for source, value in values.items()}
    return Judgement(name, measure.title, measure.meaning, values, shown, comparisons)


def _beside(values: Mapping[str, float], *, ratio: bool) -> str:
    """List the other sources' values; with `ratio`, first the trained one's ratio to chance."""
    others = {source: value for source, value in values.items() if source != "trained"}
    texts = []
    if ratio and (chance := others.pop("chance", 0.0)) > 0:
        texts.append(f"{values['trained'] / chance:.1f} times chance ({percent(chance)})")
    texts += [f"{SOURCES[source]} {percent(value)}" for source, value in others.items()]
    return ", ".join(texts)


def _enumerate(titles: Sequence[str], total: int) -> str:
    """Name one or two measures and count more; the rest is named with the other verdicts."""
    if len(titles) == total > 1:
        return "both measures" if total == 2 else f"all {total} measures"
    if len(titles) > 2:
        return f"{len(titles)} of {total} measures"
    return " and in ".join(title[0].lower() + title[1:] for title in titles)
