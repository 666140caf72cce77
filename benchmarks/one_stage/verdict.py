"""The rule: whether one stage is better than the best other arm on every data set.

A set has a primary measure. In each draw of `resampling` the best other arm is chosen anew, and
M3I minus it has an interval of 95 % (percentiles). The claim "one stage is better"

- holds if the interval's lower end is above 0 on every set. No correction is needed for demanding
  it of all (intersection-union, Berger 1982), nor for choosing the best arm: the lower end is not
  above that of M3I minus any single arm;
- is refuted if its upper end is below MARGIN on every set;
- else the arms are not told apart, and the experiment is run once more at three times the budget.

Choosing the best of k arms that are alike favours them twice, once in the means and once in the
draws, so that the interval is lower than that of a single difference. For `holds` it is cautious
(with all arms alike less than 0.1 % of experiments say so on one set). For `refuted` it is the
reverse: where M3I is better by MARGIN itself than four others that tie, 18 % of experiments have an
upper end below it on one set, and 3 % on both. `power` simulates both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from m3i_fast.benchmarks.ledger.readme_tables import markdown
from m3i_fast.benchmarks.one_stage.resampling import CONFIDENCE, ArmDraws, Floats

OURS = "m3i"
MARGIN = 1.0  # points
Outcome = Literal["holds", "refuted", "not told apart"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure or a difference of figures in points, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What one measure of one data set says."""

    measure: str
    """As a reader shall read it: `styles: linear probe, %`."""
    seeds: tuple[int, ...]
    num_clusters: int
    by_seed: dict[str, tuple[float, ...]]
    """Arm -> the figure of each seed."""
    means: dict[str, Estimate]
    """Arm -> its mean over seeds; the interval lacks what a seed does to all arms alike."""
    minus: dict[str, Estimate]
    """Other arm -> M3I minus it."""
    best_other: str
    """The other arm with the highest mean."""
    minus_best: Estimate
    """M3I minus `best_other`; the interval is over draws, each with its own best other arm."""
    standard_error: float
    """Of a single difference, in points."""
    detectable: float
    """The single difference that such an experiment finds in 80 % of cases, in points."""

    @property
    def outcome(self) -> Outcome:
        """Return what the rule says of this measure alone."""
        if self.minus_best.low > 0:
            return "holds"
        return "refuted" if self.minus_best.high < MARGIN else "not told apart"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome, and what it was decided by."""

    outcome: Outcome
    sets: dict[str, Comparison]

    def as_figures(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return asdict(self)


# ---- Rule ----------------------------------------------------------------------------------------


def compare(measure: str, drawn: ArmDraws, *, ours: str = OURS) -> Comparison:
    """Compare one arm with each other and with the best. Raises ValueError where it has no runs."""
    if ours not in drawn.arms:
        raise ValueError(f"arms: expected {ours} and others, got {list(drawn.arms)}")
    index = drawn.arms.index(ours)
    others = [arm for arm in drawn.arms if arm != ours]
    places = [drawn.arms.index(arm) for arm in others]
    best = places[int(drawn.means[places].argmax())]
    minus = drawn.draws[:, [index]] - drawn.draws[:, places]  # [B, A - 1]
    lead = drawn.means[index] - drawn.means
    return Comparison(
        measure=measure,
        seeds=drawn.seeds,
        num_clusters=drawn.num_clusters,
        by_seed={a: tuple(drawn.figures[:, i].tolist()) for i, a in enumerate(drawn.arms)},
        means={a: _estimate(drawn.means[i], drawn.draws[:, i]) for i, a in enumerate(drawn.arms)},
        minus={
            arm: _estimate(lead[place], minus[:, i])
            for i, (arm, place) in enumerate(zip(others, places, strict=True))
        },
        best_other=drawn.arms[best],
        minus_best=_estimate(lead[best], minus.min(1)),
        standard_error=drawn.noise.standard_error,
        detectable=drawn.noise.detectable,
    )


def judge(sets: Mapping[str, Comparison]) -> Verdict:
    """Apply the rule to the primary measures, one a data set; ValueError where less than two."""
    if len(sets) < 2:
        raise ValueError(f"sets: expected two or more, got {list(sets)}: the rule asks for all")
    outcomes = {each.outcome for each in sets.values()}
    outcome: Outcome = outcomes.pop() if len(outcomes) == 1 else "not told apart"
    return Verdict(outcome=outcome, sets=dict(sets))


def _estimate(value: float, draws: Floats) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return Estimate(value=float(value), low=float(low), high=float(high))


# ---- Tables --------------------------------------------------------------------------------------


def comparison_table(each: Comparison, *, ours: str = OURS) -> Table:
    """Return one measure's arms, the best on top, for 80 columns and more."""
    table = Table(
        title=Text(each.measure, style="bold"),
        title_justify="left",
        caption=Text(
            f"{len(each.seeds)} seeds, {each.num_clusters:,} clusters; 95 % intervals. "
            f"A single difference of {each.detectable:.1f} points is found in 80 % of cases."
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("arm", overflow="fold")
    for column in ("mean", "seeds", f"{ours} minus it"):
        table.add_column(column, justify="right", overflow="fold")
    for arm in sorted(each.means, key=lambda arm: -each.means[arm].value):
        figures = each.by_seed[arm]
        table.add_row(
            Text(arm, style="bold" if arm == ours else ""),
            f"{each.means[arm].value:.1f}",
            f"{min(figures):.1f} to {max(figures):.1f}",
            str(each.minus[arm]) if arm in each.minus else "",
        )
    table.add_section()
    table.add_row(
        "best other", f"{each.means[each.best_other].value:.1f}", "", str(each.minus_best)
    )
    return table


def page_table(compared: Mapping[str, Comparison], *, ours: str = OURS) -> str:
    """Return all sets' arms as a table of Markdown, the best on the first set on top."""
    sets = list(compared.values())
    head = ["arm", *(text for each in sets for text in (each.measure, f"{ours} minus it"))]
    lines = []
    for arm in sorted(sets[0].means, key=lambda arm: -sets[0].means[arm].value):
        cells = []
        for each in sets:
            seeds = each.by_seed[arm]
            cells += [
                f"{each.means[arm].value:.1f} ({min(seeds):.1f} to {max(seeds):.1f})",
                str(each.minus.get(arm, "-")),
            ]
        lines.append([arm, *cells])
    best = [text for each in sets for text in (each.best_other, str(each.minus_best))]
    return markdown(head, [*lines, ["best other arm", *best]])


def sentences(verdict: Verdict) -> list[str]:
    """Return the verdict, and what it is by, in words."""
    claim = "One stage is better than the best other arm on every set"
    said = {
        "holds": f"{claim}: holds.",
        "refuted": f"{claim}: refuted; by less than {MARGIN:g} point if at all, on each.",
        "not told apart": f"{claim}: not told apart.",
    }
    by = [
        f"{name}: m3i minus the best other arm ({each.best_other} by its mean) is "
        f"{each.minus_best} points: {each.outcome}."
        for name, each in verdict.sets.items()
    ]
    return [said[verdict.outcome], *by]
