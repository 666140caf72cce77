"""The rule and its tables; oracles: numpy on the draws, and cases that are clear by hand."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console, RenderableType

from m3i_fast.benchmarks.one_stage.resampling import ArmDraws, Noise
from m3i_fast.benchmarks.one_stage.verdict import (
    Comparison,
    Estimate,
    compare,
    comparison_table,
    judge,
    page_table,
    sentences,
)

Floats = npt.NDArray[np.float64]
ARMS = ("siameseim", "m3i", "category + caption", "slip", "two stages")


def _drawn(means: Any, deviation: float = 1.0) -> ArmDraws:
    rng = np.random.default_rng(0)
    noise = Noise(residual=5 * deviation**2, clusters=0.0, num_arms=5, num_folds=5)
    figures = np.asarray(means, float) + np.linspace(-1, 1, 5)[:, None]
    return ArmDraws(
        arms=ARMS,
        seeds=(0, 1, 2, 3, 4),
        num_clusters=1680,
        figures=figures,
        means=figures.mean(0),
        draws=figures.mean(0) + rng.normal(0, deviation, (10_000, 5)),
        noise=noise,
    )


def test_a_comparison_is_of_the_draws() -> None:
    drawn = _drawn([40.0, 45.0, 43.0, 42.5, 30.0])
    each = compare("styles: linear, %", drawn)
    ours, others = drawn.draws[:, 1], drawn.draws[:, [0, 2, 3, 4]]
    assert each.best_other == "category + caption" and list(each.minus) == [
        "siameseim",
        "category + caption",
        "slip",
        "two stages",
    ]
    ends = np.percentile(ours - others.max(1), [2.5, 97.5])
    assert [each.minus_best.low, each.minus_best.high] == pytest.approx(list(ends))
    assert each.minus_best.value == pytest.approx(2.0)
    for index, arm in enumerate(each.minus):
        ends = np.percentile(ours - others[:, index], [2.5, 97.5])
        assert [each.minus[arm].low, each.minus[arm].high] == pytest.approx(list(ends))
        assert each.minus[arm].value == pytest.approx(45 - drawn.means[ARMS.index(arm)])
    assert each.means["slip"].value == pytest.approx(42.5)
    assert each.by_seed["slip"] == pytest.approx((41.5, 42.0, 42.5, 43.0, 43.5))
    assert each.detectable == drawn.noise.detectable > each.standard_error
    # Which the rule's lack of a correction rests on.
    assert each.minus_best.low <= min(one.low for one in each.minus.values())
    with pytest.raises(ValueError, match="arms: expected mae and others, got \\['siameseim'"):
        compare("it", drawn, ours="mae")


def _of(low: float, high: float) -> Comparison:
    each = compare("it", _drawn([40.0, 45.0, 43.0, 42.5, 30.0]))
    return replace(each, minus_best=Estimate(value=(low + high) / 2, low=low, high=high))


@pytest.mark.parametrize(
    ("styles", "earth", "outcome"),
    [
        ((0.1, 4.0), (0.2, 0.9), "holds"),
        ((0.1, 4.0), (0.0, 3.0), "not told apart"),
        ((-0.1, 4.0), (0.2, 3.0), "not told apart"),
        ((-3.0, 0.9), (-2.0, 0.5), "refuted"),
        ((-3.0, 1.0), (-2.0, 0.5), "not told apart"),
        ((-3.0, 0.9), (0.1, 2.0), "not told apart"),
        ((-3.0, 0.9), (-3.0, 4.0), "not told apart"),
    ],
)
def test_the_rule(styles: Any, earth: Any, outcome: str) -> None:
    verdict = judge({"styles": _of(*styles), "earth": _of(*earth)})
    assert verdict.outcome == outcome
    assert outcome in sentences(verdict)[0]
    with pytest.raises(ValueError, match="sets: expected two or more, got \\['styles'\\]"):
        judge({"styles": _of(*styles)})


def test_json_holds_a_verdict() -> None:
    verdict = judge({"styles": _of(0.1, 4.0), "earth": _of(-1.0, 3.0)})
    figures = json.loads(json.dumps(verdict.as_figures()))
    assert figures["outcome"] == "not told apart"
    assert figures["sets"]["earth"]["minus_best"] == {"value": 1.0, "low": -1.0, "high": 3.0}
    assert figures["sets"]["styles"]["by_seed"]["m3i"] == [44.0, 44.5, 45.0, 45.5, 46.0]


def _shown(table: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80, markup=False, emoji=False)
    console.print(table)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_table_is_whole_in_80_columns() -> None:
    drawn = _drawn([-40.0, 45.0, 43.0, 42.5, 30.0], deviation=12.0)
    each = compare("styles: accuracy of a linear probe of the hard half, %", drawn)
    text = _shown(comparison_table(each))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    names = [arm for line in lines for arm in ARMS if line.strip().startswith(arm)]
    assert names == ["m3i", "category + caption", "slip", "two stages", "siameseim"]
    for cell in (each.measure, *(str(one) for one in each.minus.values()), str(each.minus_best)):
        assert cell in text
    assert "-41.0 to -39.0" in text and "+85.0 (" in text
    said = " ".join(text.split())
    assert "5 seeds, 1,680 clusters" in said
    assert f"A single difference of {each.detectable:.1f} points is found" in said


def test_a_page_has_every_arm_of_every_set_once() -> None:
    means = {"styles": [40.0, 45.0, 43.0, 42.5, 30.0], "earth": [30.0, 29.0, 28.0, 31.0, 20.0]}
    compared = {name: compare(f"{name}, %", _drawn(values)) for name, values in means.items()}
    rows = [line.strip("| ").split(" | ") for line in page_table(compared).splitlines()]
    assert rows[0] == ["arm", "styles, %", "m3i minus it", "earth, %", "m3i minus it"]
    assert [row[0] for row in rows[2:]] == [
        "m3i", "category + caption", "slip", "siameseim", "two stages", "best other arm",
    ]  # fmt: skip
    assert rows[2] == ["m3i", "45.0 (44.0 to 46.0)", "-", "29.0 (28.0 to 30.0)", "-"]
    styles, earth = compared.values()
    slip = ["42.5 (41.5 to 43.5)", str(styles.minus["slip"]), "31.0 (30.0 to 32.0)"]
    assert rows[4] == ["slip", *slip, str(earth.minus["slip"])]
    best = ["category + caption", str(styles.minus_best), "slip", str(earth.minus_best)]
    assert rows[-1][1:] == best and earth.minus_best.value == pytest.approx(-2.0)


def test_sentences_name_the_best_other_arm() -> None:
    verdict = judge({"styles": _of(0.0625, 4.0), "earth": _of(0.3, 3.0)})
    said = sentences(verdict)
    assert len(said) == 3 and "+2.0 (+0.1 to +4.0) points: holds." in said[1]
    assert "earth: m3i minus the best other arm (category + caption by its mean)" in said[2]
