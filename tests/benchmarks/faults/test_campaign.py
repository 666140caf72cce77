"""A few trials of every fault, and what the campaign says of a run that lost something."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from m3i_fast.benchmarks.faults.campaign import Campaign, Trial
from m3i_fast.benchmarks.faults.fault_catalogue import MIDDLE, plan
from m3i_fast.benchmarks.faults.main import carry_out
from m3i_fast.benchmarks.faults.report import PAGE, PICTURE, by_fault, newest, page, picture
from m3i_fast.cli import main


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    yield Campaign(tmp_path_factory.mktemp("campaign"))


@pytest.mark.distributed
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_runs_recover_from_every_fault(every: int, campaign: Campaign) -> None:
    trials = plan(campaign, kills=2, writes=1)[::every]
    found = carry_out(campaign, trials, jobs=1)
    assert len(found) == len(trials) >= 15 // every
    bad = [v for v in found if not (v.recovered and v.weights_equal)]
    assert not bad, "\n\n".join(f"{v.fault}, {v.where}: {v.log}" for v in bad)


@pytest.mark.distributed
def test_what_a_run_lost_is_found_out(campaign: Campaign) -> None:
    """A step is taken back, and the run says nothing of it; or it ends as it should not."""

    def lose_a_step(campaign: Campaign, run: object) -> bool:
        campaign.go(run, inside={0: [("undone", {"step": MIDDLE})]})  # type: ignore[arg-type]
        return True

    lost, failed = carry_out(
        campaign,
        [
            Trial(fault="a lost step", where="", spoil=lose_a_step),
            Trial(fault="another end", where="", spoil=lambda *_: False),
        ],
        jobs=1,
    )
    assert lost.recovered and not lost.weights_equal and lost.log
    assert not failed.recovered and not failed.weights_equal


def test_the_page_is_of_the_newest_rows() -> None:
    rows = newest()
    assert PAGE.read_text() == page(rows), "m3i-fast faults --record"
    assert PICTURE.read_text() == picture(rows)
    assert sum(map(len, by_fault(rows).values())) == len(rows)
    assert len(by_fault(rows)["kill -9 at a random moment"]) >= 100
    squares = ElementTree.fromstring(picture(rows)).iter("{http://www.w3.org/2000/svg}rect")
    assert sum(square.get("class") in ("ours", "others") for square in squares) == len(rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kills", "-1"], "--kills: expected >= 0, got -1"),
        (["--jobs", "0"], "--jobs: expected >= 1, got 0"),
    ],
)
def test_a_wrong_flag_is_named(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["faults", *flags])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
