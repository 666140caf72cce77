"""The ablation: one row a run, nothing run twice, and a table that says what the rows say."""

from pathlib import Path

import pytest

from m3i_fast.benchmarks import demo_ablation
from m3i_fast.benchmarks.demo_ablation import (
    METHODS,
    Ablation,
    main,
    recipe_digest,
    run_missing,
    table,
)
from m3i_fast.benchmarks.harness import append_row, read_rows
from m3i_fast.pipelines import openmoji
from m3i_fast.recipes import DEMO_MERGES, demo


def _row(method: str, hits: str, seed: int = 0) -> dict[str, object]:
    who = {"knn_top1": hits, "linear_top1": hits}
    return {
        "method": method,
        "labelled": 1.0,
        "seed": seed,
        "num_steps": 7,
        "recipe": recipe_digest(method),
        "hits": {"trained": who, "untrained": {"knn_top1": "0" * len(hits)}, "pixels": {}},
    }


def test_every_method_is_a_config() -> None:
    for name, change in METHODS.items():
        cfg = change(demo())
        assert cfg.objective.active_terms, name
    assert len(METHODS["caption only"](demo()).objective.active_terms) == 1
    assert METHODS["no mixing"](demo()).objective.mixing.mode == "none"


def test_the_table_averages_seeds_item_by_item(tmp_path: Path) -> None:
    for method, hits, seed in (
        ("m3i", "1111" * 20, 0),
        ("m3i", "1100" * 20, 1),
        ("intra only", "1000" * 20, 0),
    ):
        append_row(demo_ablation.SUBJECT, _row(method, hits, seed), command="test", folder=tmp_path)
    lines = table(7, 1.0, tmp_path).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[3:]}
    assert cells["m3i"][1] == "75.0"  # (1, 1, 0.5, 0.5)
    assert cells["intra only"][1].startswith("25.0 (+7")  # against the seed that both ran: 100
    assert cells["untrained"][1].startswith("0.0 (+")
    assert cells["raw pixels"][1] == "-"
    assert "no m3i row" in table(8, 1.0, tmp_path)
    older = {**_row("category only", "1000" * 20), "recipe": "older"}
    append_row(demo_ablation.SUBJECT, older, command="test", folder=tmp_path)
    assert "category only" not in table(7, 1.0, tmp_path)


def test_runs_are_resumed_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation = Ablation(
        num_steps=2,
        labelled=(1.0,),
        methods=("m3i", "category only"),
        jobs=2,  # one thread each: two that share two cores with other tests would spin
        data=tmp_path,
        out=tmp_path / "runs",
        ledger=tmp_path / "ledger",
    )
    openmoji.build(
        tmp_path / "openmoji",
        limit=90,
        num_merges=DEMO_MERGES,
        context_length=demo().text.context_length,
    )
    run_missing(ablation)
    rows = [row["figures"] for row in read_rows(demo_ablation.SUBJECT, folder=ablation.ledger)]
    hits = {row["method"]: row["hits"]["trained"] for row in rows}  # either may have ended first
    assert hits.keys() == {"m3i", "category only"}
    assert len(hits["m3i"]["knn_top1"]) == rows[0]["held_out_concepts"]
    assert "caption_to_image_recall_at_5" not in hits["category only"]
    run_missing(ablation)
    assert len(list(read_rows(demo_ablation.SUBJECT, folder=ablation.ledger))) == 2
    main(
        ["--table-only", "--num-steps", "2", "--labelled", "1.0", "--ledger", str(ablation.ledger)]
    )
    assert "| category only |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--methods"):
        run_missing(Ablation(methods=("m4i",)))
