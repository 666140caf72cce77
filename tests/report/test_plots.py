import base64
import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from m3i_fast.report.evaluations.verdict import judge
from m3i_fast.report.panels import Panel, plotly_source
from m3i_fast.report.run.curves import (
    MAX_BINS,
    curve,
    curves,
    gradient_shares,
    how_drawn,
    stage_medians,
    thinned,
    time_shares,
    what_bounds,
)
from m3i_fast.report.run.figures import bars, recall_curve
from tests.report.sample_run import columns


def _curve(values: list[float]) -> Panel:
    return curve("loss/total", 10.0 * np.arange(1, len(values) + 1), np.array(values))


def test_a_curve_shows_the_logged_values_and_their_mean() -> None:
    values = np.sin(np.arange(60) / 3) + np.arange(60) / 10
    raw, smooth = _curve(values.tolist()).figure["data"]
    assert raw["x"] == [10.0 * (i + 1) for i in range(60)]
    np.testing.assert_allclose(raw["y"], values, rtol=1e-5)
    inner = np.convolve(values, np.full(5, 1 / 5), mode="valid")  # window 60 // 12, both sides
    np.testing.assert_allclose(smooth["y"][2:-2], inner, rtol=1e-5)
    np.testing.assert_allclose(
        [smooth["y"][0], smooth["y"][-1]], [values[0], values[-1]], rtol=1e-5
    )


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    values = [1.0] * 30 + [math.nan] + [1.0] * 30
    panel = _curve(values)
    raw, smooth = panel.figure["data"]
    assert raw["y"][30] is None
    assert smooth["y"].count(None) == 0 and set(smooth["y"]) == {1.0}
    json.dumps(panel.figure, allow_nan=False)


def test_a_long_run_keeps_its_spikes_and_its_mean() -> None:
    num = 10 * MAX_BINS + 3  # bins of 11 steps
    values = np.array([float(i % 2) for i in range(num)])
    values[777], values[1234] = 50.0, math.inf
    raw, smooth = _curve(values.tolist()).figure["data"]
    assert len(raw["x"]) <= 3 * MAX_BINS and len(smooth["x"]) <= MAX_BINS
    assert raw["y"][raw["x"].index(7780.0)] == 50.0
    assert raw["y"][raw["x"].index(12350.0)] is None
    assert (raw["x"][0], raw["x"][-1]) == (10.0, 10.0 * num)
    assert smooth["x"][0] == pytest.approx(np.mean(10.0 * np.arange(1, 12)))
    np.testing.assert_allclose(smooth["y"][-100:-1], 0.5, atol=0.05)


@given(
    values=st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300),
    bins=st.integers(1, 20),
)
@settings(deadline=None)
def test_thinning_keeps_the_extremes_of_every_bin(values: list[float], bins: int) -> None:
    steps, given_values = np.arange(len(values), dtype=float), np.array(values)
    x, y = thinned(steps, given_values, max_bins=bins)
    np.testing.assert_array_equal(y, given_values[x.astype(int)])
    assert (np.diff(x) > 0).all() and len(x) <= max(
        3 * bins + 2, len(values) * (len(values) <= bins)
    )
    size = math.ceil(len(values) / bins)
    for start in range(0, len(values), size):
        inside = given_values[start : start + size]
        kept = y[(x >= start) & (x < start + size)]
        assert np.isnan(kept).any() == np.isnan(inside).any()
        if not np.isnan(inside).all():
            assert (np.nanmin(kept), np.nanmax(kept)) == (np.nanmin(inside), np.nanmax(inside))


def test_captions_are_counted_when_their_picture_is_among_the_nearest() -> None:
    """The recall at every k, by open_clip's way to count it: ranks below k."""
    ranks = {"trained": [0, 0, 2, 1, 7, 0, 3, 9, 4, 0], "untrained": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}
    panel = recall_curve(ranks)
    drawn = {trace["name"]: trace for trace in panel.figure["data"]}
    for who, of in (ranks | {"chance": list(range(10))}).items():
        assert drawn[who]["x"] == list(range(1, 11))
        assert drawn[who]["y"] == [pytest.approx(np.mean(np.array(of) < k)) for k in range(1, 11)]
    assert panel.note.endswith("among the nearest: trained 2, untrained 5, chance 5")


@pytest.mark.parametrize("num", [1, 23, 24, MAX_BINS, MAX_BINS + 1])
def test_the_sentence_says_what_is_drawn(num: int) -> None:
    traces = _curve([1.0] * num).figure["data"]
    sentence = how_drawn(num)
    assert ("moving mean" in sentence) == (len(traces) == 2)
    assert sentence.startswith("Every logged step") == (len(traces[0]["x"]) == num)


def test_known_curves_come_first_and_unknown_ones_are_not_lost() -> None:
    row = {"step": 1.0, "loss/zeta": 1.0, "loss/caption": 1.0, "loss/total": 1.0, "optim/lr": 1.0}
    logged = columns([row])
    assert [panel.title for panel in curves(logged, "loss")] == ["Total", "Caption", "zeta"]
    assert curves(logged, "monitor") == []


def test_shares_of_the_gradient_are_means_of_the_steps_before() -> None:
    rng = np.random.default_rng(0)
    pulls = {name: rng.random(60) * size for name, size in (("a", 1.0), ("b", 5.0), ("rare", 40.0))}
    pulls["rare"][np.arange(60) % 4 > 0] = 0.0  # a step in four has a picture with a target
    pulls["a"][59] = math.nan
    rows = [
        {"step": 20.0 * (i + 1)} | {f"gradient/{name}": pull[i] for name, pull in pulls.items()}
        for i in range(60)
    ]
    panel = gradient_shares(columns([{"step": 0.0, "loss/total": 1.0}, *rows]))
    assert panel is not None
    shares = {trace["name"].split()[0]: trace["y"] for trace in panel.figure["data"]}
    assert list(shares) == ["a", "b", "rare"]
    for end in (1, 5, 10, 37, 60):  # the last ten, a sixth of the steps
        means = {name: np.nanmean(pull[max(end - 10, 0) : end]) for name, pull in pulls.items()}
        expected = {name: mean / sum(means.values()) for name, mean in means.items()}
        assert {name: y[end - 1] for name, y in shares.items()} == pytest.approx(expected, rel=1e-5)
    for trace in panel.figure["data"]:
        name, percent = trace["name"].split()
        last = 100 * trace["y"][-1]
        assert percent == (f"{last:.1f}%" if last < 10 else f"{last:.0f}%")
        assert trace["name"] in panel.label
    json.dumps(panel.figure, allow_nan=False)


def test_a_term_alone_has_no_share() -> None:
    assert gradient_shares(columns([{"step": 1.0, "gradient/a": 1.0}])) is None
    assert gradient_shares({}) is None
    none = [{"step": 1.0, "gradient/a": 0.0, "gradient/b": 0.0}]
    panel = gradient_shares(columns(none))
    assert panel is not None and [t["y"] for t in panel.figure["data"]] == [[0.0], [0.0]]


def test_bars_carry_the_figures_and_say_them() -> None:
    (judgement,) = judge({"knn_top1": {"chance": 0.25, "trained": 0.5, "pixels": 0.4}})
    panel = bars(judgement)
    (trace,) = panel.figure["data"]
    assert list(zip(trace["y"], trace["x"], strict=True)) == [
        ("trained", 0.5),
        ("raw pixels", 0.4),
        ("chance", 0.25),
    ]
    assert panel.label == "Category by kNN: trained 50.0%, raw pixels 40.0%, chance 25.0%"


def test_time_shares_are_medians_and_sum_to_the_step() -> None:
    rows = [
        {
            "step": i,
            "time/data.wait_ms": 10.0,
            "time/loss.intra_ms": 20.0 + 1000 * (i == 0),
            "time/loss.total_ms": 10.0,
        }
        for i in range(5)
    ]
    panel = time_shares(columns(rows))
    assert panel is not None
    (trace,) = panel.figure["data"]
    assert list(trace["text"]) == ["25%, 10 ms", "75%, 30 ms"]
    assert panel.note == "40 ms, medians over the logged steps"
    assert time_shares({}) is None
    assert stage_medians(columns(rows)) == {"data.wait": 10.0, "loss": 30.0}
    assert what_bounds(stage_medians(columns(rows))).startswith(
        "Waiting for the loader takes 25.0%"
    )
    assert what_bounds({}) == ""


def test_plotly_comes_out_as_it_went_in() -> None:
    assert gzip.decompress(base64.b64decode(plotly_source())).decode() == get_plotlyjs()
