"""The page as a reader meets it: in a browser, at two widths, in both colour schemes."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.observe.collapse import healthy_range
from m3i_fast.report.run.page import MixedPair, ReportInputs, write_report
from tests.report import sample_run
from tests.shared.chromium import check_page, skip_reason

browser = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sample_run.report_inputs(), tmp_path_factory.mktemp("run") / "report.html")


def _figures(page: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    found = re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    figures: dict[str, dict] = json.loads(found[1])  # type: ignore[type-arg]
    return figures


@pytest.mark.pages
@browser
def test_page_reads_well_in_a_browser(page: Path, tmp_path: Path) -> None:
    views = check_page(page, tmp_path, num_figures=len(_figures(page)))
    assert {(view.width, view.scheme) for view in views} == {
        (width, scheme) for width in (360, 1280) for scheme in ("light", "dark")
    }
    assert all(view.screenshot.stat().st_size > 100_000 for view in views)


FLAWS = '<p style="width: 500px">wide</p><p style="color: #999">pale</p><img alt="" src="data:,">'
SEEN = r'contrast .* of "pale".*the page is 5.. px wide.*without alternative text'


@pytest.mark.pages
@browser
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("</header>", f"{FLAWS}</header>", SEEN),
        ("</header>", '<img alt="x" src="http://127.0.0.1:9/x.png"></header>', "127.0.0.1:9"),
        ("Plotly.react(", "Plotly.nothing(", "nothing is not a function"),
    ],
)
def test_the_browser_check_notices(
    page: Path, tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace(old, new, 1))
    with pytest.raises(AssertionError, match=complaint):
        check_page(broken, tmp_path, num_figures=len(_figures(page)))


def test_page_holds_everything_and_asks_for_nothing(page: Path) -> None:
    html = page.read_text()
    own = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", html, flags=re.DOTALL)
    sources = re.findall(r'(?:src|href)="([^"]*)"', own)
    assert len(sources) > 100 and all(source.startswith("data:") for source in sources)
    assert "http" not in re.sub(r"http-equiv", "", own)
    assert "default-src 'none'" in own  # the browser refuses what we missed


def test_figures_are_one_a_measure_a_curve_and_the_time_shares(page: Path) -> None:
    groups = [name.split("-")[0] for name in _figures(page)]
    counts = {group: groups.count(group) for group in set(groups)}
    assert counts == {
        "measure": 5,
        "evaluate": 4,
        "loss": 5,
        "gradient": 1,
        "optim": 2,
        "monitor": 12,
        "time": 1,
        "throughput": 1,
        "found": 1,
        "confusion": 1,
        "calibration": 1,
    }


def test_monitors_show_their_healthy_range(page: Path) -> None:
    figures = _figures(page)
    drawn = {
        name: [(s["y0"], s["y1"]) for s in figures[name]["layout"].get("shapes", [])]
        for name in ("monitor-target_rank", "monitor-caption_log_scale", "loss-total")
    }
    rank, scale = healthy_range("monitor/target_rank"), healthy_range("monitor/caption_log_scale")
    assert rank and scale
    assert drawn == {
        "monitor-target_rank": [(rank.low, rank.low)],
        "monitor-caption_log_scale": [(scale.low, scale.low), (scale.high, scale.high)],
        "loss-total": [],
    }
    assert f"RankMe: 1 when collapsed; healthy: {rank.text}" in page.read_text()


def test_captions_are_text_not_markup(page: Path) -> None:
    inputs = sample_run.report_inputs()
    hostile = replace(
        inputs, title="</title><script>alert(1)</script>", retrieval_choice="<b>x</b>"
    )
    html = write_report(hostile, page.with_name("hostile.html")).read_text()
    assert "<script>alert" not in html and "<b>x</b>" not in html
    assert "a printed page &amp; its shadow" in html


def test_settings_are_one_a_line(page: Path) -> None:
    rows = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page.read_text()))
    expected = {
        "recipe": "demo",
        "vision.dim": "128",
        "objective.terms.intra.weight": "1",
        "objective.sigma": "0.707107",
        "optim.betas": "0.9, 0.98",
        "optim.clip_grad_norm": "none",
        "torch": "2.13",
    }
    assert expected.items() <= rows.items()


def test_words_follow_the_figures(page: Path) -> None:
    inputs = sample_run.report_inputs()
    figures = dict(inputs.evaluation)
    figures["trained_minus"] = {
        "knn_top1": {s: {"difference": -0.05, "low": -0.09, "high": -0.01} for s in ("untrained",)}
    }
    figures["knn_top1"] = {"trained": 0.457, "untrained": 0.507, "chance": 0.286}
    html = write_report(replace(inputs, evaluation=figures), page.with_name("w.html")).read_text()
    assert "worse in category by kNN" in html
    assert "worse in" not in page.read_text()
    del figures["trained_minus"]
    html = write_report(replace(inputs, evaluation=figures), page.with_name("n.html")).read_text()
    assert "No intervals were computed" in html and "better in" not in html


def test_figures_are_shown_in_their_unit(page: Path) -> None:
    inputs = sample_run.report_inputs()
    figures = inputs.evaluation | {
        "caption_information_nats": {"trained": 1.234, "untrained": -0.001, "chance": 0.0},
        "effective_rank": {"trained": 31.46, "untrained": 9.0},
        "scene_miou": {"trained": 0.125, "untrained": 0.25, "chance": 0.02, "pixels": 0.1},
    }
    path = page.with_name("units.html")
    html = write_report(replace(inputs, evaluation=figures), path).read_text()
    table = dict(re.findall(r'<tr><th scope="row">(.*?)</th>\s*(<td>.*?</td>)\s*</tr>', html, re.S))
    cells = {title: re.findall("<td>(.*?)</td>", row) for title, row in table.items()}
    assert cells["Information of picture and caption"] == [
        "1.23 nats",
        "",  # its EMA, whose captions are not measured
        "0.00 nats",
        "",
        "0.00 nats",
    ]
    assert cells["Effective rank of features"] == ["31.5", "", "9.0", "", ""]
    assert cells["Category of a patch"] == ["12.5%", "", "25.0%", "10.0%", "2.0%"]
    drawn = {name for name in _figures(path) if name.startswith("measure")}
    assert "measure-scene_miou" in drawn and "measure-effective_rank" not in drawn


def test_a_run_of_one_logged_step_has_a_page(page: Path, tmp_path: Path) -> None:
    curves = sample_run.columns(sample_run.metrics(1))
    inputs = replace(sample_run.report_inputs(), curves=curves)
    short = write_report(inputs, tmp_path / "short.html")
    of_evaluations = {name for name in _figures(page) if name.startswith("evaluate")}
    assert _figures(short).keys() == _figures(page).keys() - of_evaluations
    if skip_reason() is None:
        check_page(short, tmp_path, num_figures=len(_figures(short)))


def test_a_part_that_is_missing_takes_no_other_figure_with_it(tmp_path: Path) -> None:
    """All steps were skipped, so that no loss was logged, and no caption is shown."""
    inputs = sample_run.report_inputs()
    lost = ("loss/", "gradient/")
    curves = {name: of for name, of in inputs.curves.items() if not name.startswith(lost)}
    absent = {"retrieval": "None is shown."}
    page = write_report(
        replace(inputs, curves=curves, retrieval=[], absent=absent), tmp_path / "page.html"
    )
    html = page.read_text()
    without_place = {name for name in _figures(page) if f'id="{name}"' not in html}
    assert without_place == {"found-within"}
    drawn = {name for name in _figures(page) if name.startswith(("optim", "monitor"))}
    assert len(drawn) > 3
    assert "No loss was logged." in html and "No step was logged." not in html
    if skip_reason() is None:
        check_page(page, tmp_path, num_figures=len(_figures(page)) - 1)


REASONS = {
    "seen": "The run's data are not there: <gone>.",
    "retrieval": "The run learns no captions.",
    "classes": "Split heldout has no classes.",
    "features": "No checkpoint can be shown: none.",
}


def test_a_run_without_anything_has_a_page_that_says_why(tmp_path: Path) -> None:
    inputs = ReportInputs(
        title="Run empty",
        curves={},
        num_steps=0,
        config={"seed": 0},
        environment={},
        absent=REASONS,
    )
    page = write_report(inputs, tmp_path / "empty.html")
    html = page.read_text()
    for reason in (*REASONS.values(), "No step was logged."):
        assert (
            html.count(reason.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;")) == 1
        )
    assert _figures(page) == {}
    if skip_reason() is None:
        check_page(page, tmp_path, num_figures=0)


def test_what_differs_from_the_recipe_stands_in_a_table(page: Path) -> None:
    html = page.read_text()
    assert "2 fields differ from recipe demo, the nearest one." in html
    assert '<th scope="row">optim.lr</th><td>0.001</td><td>0.0015</td>' in html
    inputs = replace(sample_run.report_inputs(), changed=[])
    assert "As recipe demo has it." in write_report(inputs, page.with_name("as.html")).read_text()


def test_what_bounds_the_speed_is_told(page: Path) -> None:
    assert "The model bounds the speed: Backward takes" in page.read_text()
    rows = [row | {"time/data.wait_ms": 150.0} for row in sample_run.metrics()]
    inputs = replace(sample_run.report_inputs(), curves=sample_run.columns(rows))
    html = write_report(inputs, page.with_name("slow.html")).read_text()
    assert re.search(r"Waiting for the loader takes \d\d\.\d% of a step: it bounds the speed", html)
    assert "evaluations took 75 s in all" in html


def test_a_long_run_has_a_page_under_ten_megabytes(tmp_path: Path) -> None:
    """A run of a million steps, whose one spike can be seen."""
    steps = np.arange(1, 100_001) * 10.0
    names = ("loss/total", *(f"loss/term{i}" for i in range(8)), "throughput/img_s")
    names += tuple(f"monitor/m{i}" for i in range(40))
    curves = {name: (steps, np.random.default_rng(0).normal(size=len(steps))) for name in names}
    curves["loss/total"][1][56_789] = 1e6
    inputs = replace(sample_run.report_inputs(), curves=curves, num_steps=1_000_000)
    page = write_report(inputs, tmp_path / "long.html")
    assert page.stat().st_size < 10e6
    drawn = _figures(page)["loss-total"]["data"][0]
    assert (567900.0, 1e6) in zip(drawn["x"], drawn["y"], strict=True)


def test_an_older_page_survives_a_failure(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    target.write_text("older")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'm3i-fast\[eval\]'"):
        write_report(sample_run.report_inputs(), target)
    assert target.read_text() == "older"
    assert list(tmp_path.iterdir()) == [target]


def _pair(**changes: object) -> MixedPair:
    return replace(sample_run.mixed_pair(), **changes)  # type: ignore[arg-type]


def _inputs(**changes: object) -> ReportInputs:
    return replace(sample_run.report_inputs(), **changes)  # type: ignore[arg-type]


def _nearest(**changes: object) -> object:
    return replace(sample_run.retrieval_rows()[0].trained, **changes)  # type: ignore[arg-type]


def _pca(**changes: object) -> object:
    return replace(sample_run.patch_pictures(1)[0], **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _pair(boxes_a=np.zeros((2, 4), np.float32)), r"boxes_a: expected \[2, 5\]"),
        (
            lambda: _pair(boxes_b=np.array([[0, 0, 9, 9, 0], [200, 0, 202, 9, 0]], np.float32)),
            r"boxes_b\[1\]: expected a box inside 400 x 600 pixels, got y 200",
        ),
        (lambda: _pair(mask=np.ones((5, 4), bool)), r"mask: expected cells that tile \(64, 64\)"),
        (
            lambda: _pair(mixed=np.zeros((64, 64, 3), np.float32)),
            r"mixed: expected \[H, W, 3\] uint8, got \(64, 64, 3\) float32",
        ),
        (lambda: _nearest(rank=7), "right: expected None, as the rank is 7"),
        (lambda: _nearest(names=("one",)), "names: expected one for each of 5 pictures, got 1"),
        (lambda: _pca(trained=np.full((8, 8, 3), 255.0)), r"trained: expected \[h, w, 3\] in 0..1"),
        (lambda: _inputs(retrieval_ranks={}), "retrieval_ranks: expected the ranks of all"),
        (
            lambda: replace(sample_run.guesses(), class_names=("one",)),
            r"logits: expected \[300, 1\], got \[300, 5\]",
        ),
        (
            lambda: _inputs(retrieval_ranks={"trained": [0, 2]}),
            r"retrieval_ranks\[trained\]: expected a rank of each caption among as many pictures",
        ),
        (lambda: _inputs(evaluation={"knn_top1": {}}), "expected held_out_concepts"),
    ],
)
def test_inputs_that_cannot_be_shown_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
