"""The progress bar on a terminal and off one, with a clock of its own."""

import io

import pytest
from rich.console import Console

from m3i_fast.observe.sinks.progress_bar import Pace, TrainingBar, figures_of

ROW = {
    "throughput/img_s": 1234.4,
    "loss/total": 2.5,
    "time/data.wait_ms": 30.0,
    "time/bwd_ms": 70.0,
}


class Run:
    """What a trainer tells the bar."""

    step, doing, now = 0, "the first step", 100.0

    def bar(self, out: io.StringIO, *, terminal: bool = True, shown: bool = True) -> TrainingBar:
        console = Console(file=out, force_terminal=terminal, width=160, color_system=None)
        return TrainingBar(
            console,
            num_steps=100,
            step=lambda: self.step,
            doing=lambda: self.doing,
            clock=lambda: self.now,
            is_shown=shown,
        )


def drawn(bar: TrainingBar) -> str:
    """What the bar is now, as text."""
    out = io.StringIO()
    console = Console(file=out, width=160, color_system=None)
    for part in bar.get_renderables():
        console.print(part)
    return out.getvalue()


def test_steps_are_those_of_the_run_without_a_logged_row() -> None:
    run = Run()
    bar = run.bar(io.StringIO())
    assert "0/100" in drawn(bar) and "-:--:-- left" in drawn(bar)
    run.step, run.now = 10, 120.0
    assert "10/100" in drawn(bar) and "0:03:00 left" in drawn(bar)


def test_time_left_counts_from_the_first_row_with_all_that_lies_between_steps() -> None:
    run = Run()
    bar = run.bar(io.StringIO())
    run.step, run.now = 10, 200.0  # the first steps are slow
    bar.show(10, ROW)
    run.step, run.now = 30, 240.0
    bar.show(20, {"evaluate/knn_top1": 0.5})  # an evaluation is no new beginning
    text = drawn(bar)
    assert "30/100" in text and "0:02:20 left" in text  # 2 s a step
    assert "1,234 img/s" in text and "loss 2.500" in text
    assert "kNN 50.0 %" in text and "loader 30 %" in text
    run.step = 100
    assert "0:00:00 left" in drawn(bar)


def test_without_a_terminal_every_logged_row_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bar = Run().bar(io.StringIO(), terminal=False)
    bar.show(10, ROW)
    bar.show(20, {"evaluate/knn_top1": 0.5, "evaluate/zero_shot_top1": 0.25})
    first, second = caplog.messages
    assert first == "step 10 of 100  1,234 img/s  loss 2.500  loader 30 %"
    assert second == "step 20 of 100  kNN 50.0 %  zero-shot 25.0 %"
    Run().bar(io.StringIO()).show(10, ROW)
    Run().bar(io.StringIO(), terminal=False, shown=False).show(10, ROW)
    assert len(caplog.messages) == 2


def test_a_resumed_run_counts_from_where_it_began() -> None:
    run = Run()
    run.step = 50
    bar = run.bar(io.StringIO())
    run.step, run.now = 60, 110.0
    assert "60/100" in drawn(bar) and "0:00:40 left" in drawn(bar)


def test_a_rollback_takes_the_bar_back() -> None:
    run = Run()
    bar = run.bar(io.StringIO())
    run.step, run.now = 40, 140.0
    bar.show(40, ROW)
    run.step, run.now = 50, 150.0
    assert "0:00:50 left" in drawn(bar)
    run.step, run.now = 20, 160.0
    assert "20/100" in drawn(bar) and "-:--:-- left" in drawn(bar)
    bar.show(30, ROW)
    run.step, run.now = 40, 180.0
    assert "40/100" in drawn(bar) and "0:02:00 left" in drawn(bar)


def test_only_what_lasts_is_told() -> None:
    run = Run()
    bar = run.bar(io.StringIO())
    run.doing = "data.wait"
    assert "waiting" not in drawn(bar)
    run.now += 2
    assert "waiting for the loader" in drawn(bar)
    run.doing = "bwd"
    assert "waiting" not in drawn(bar)
    for doing, told in (("a save", "saving a checkpoint"), ("an evaluation", "evaluating")):
        run.doing = doing
        drawn(bar)
        run.now += 2
        assert told in drawn(bar)


def test_off_a_terminal_one_line_is_written_at_the_end() -> None:
    run, out = Run(), io.StringIO()
    with run.bar(out, terminal=False) as bar:
        for step in range(1, 101):
            run.step, run.now = step, run.now + 1
            bar.show(step, ROW)
            bar.refresh()
        assert out.getvalue() == ""
    assert out.getvalue().count("\n") == 1 and "100/100" in out.getvalue()


def test_other_ranks_draw_nothing() -> None:
    run, out = Run(), io.StringIO()
    with run.bar(out, shown=False) as bar:
        bar.show(1, ROW)
    assert out.getvalue() == ""


def test_a_row_of_skipped_steps_has_no_loss() -> None:
    assert figures_of({"throughput/img_s": 10.0}) == ["10 img/s", "loss nan"]
    assert figures_of({}) == []


def test_no_pace_is_known_before_a_step() -> None:
    pace = Pace(5, 0.0)
    assert pace.seconds_left(5, 10.0, 10) is None
    assert pace.seconds_left(7, 10.0, 10) == pytest.approx(15.0)
    assert pace.seconds_left(10, 10.0, 10) == 0.0
