"""m3i-fast plan as it is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m3i_fast.cli import main
from m3i_fast.recipes import demo

DEMO = ["plan", "demo", "--data.batch-size", "4"]


def test_json_has_the_recipe_with_its_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, "--gpus", "16", "--card", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == "demo"
    assert found["batch_size"] == 4
    assert found["global_batch"] == 64
    assert found["nodes"] == {"num_ranks": 16, "ranks_per_node": 8}
    assert [strategy["name"] for strategy in found["strategies"]] == ["ddp", "fsdp"]
    assert found["assumptions"]


def test_tables_say_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, "--card", "cpu"]) == 0
    shown = capsys.readouterr().out
    for words in ("no card has run them", "(prediction)", "(assumed)", "Assumptions", "bottleneck"):
        assert words in " ".join(shown.split())


def test_a_global_batch_is_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--gpus", "2", "--global-batch", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 4


def test_a_saved_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    demo().save(path)
    assert main(["plan", "--config", str(path), "--data.batch-size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "saved"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dem"], r"unknown recipe 'dem'.*Did you mean demo"),
        (["demo", "--card", "h1000"], r"--card: .*h100.*got 'h1000'"),
        (["demo", "--gpus", "0"], r"--gpus: expected at least 1, got 0"),
        (["demo", "--gpus", "12"], r"--gpus: .*multiple of --gpus-per-node 8, got 12"),
        (["demo", "--gpus", "3", "--global-batch", "8"], r"--global-batch: .*--gpus 3, got 8"),
        (["demo", "--gpus", "2", "--global-batch", "6"], r"data\.batch_size: .*got 3"),
        (["demo", "--utilisation", "1.5"], r"--utilisation: .*got 1\.5"),
        (["demo_milan"], r"objective\.terms: .*frozen"),
        (["--config"], r"--config: expected a file"),
    ],
)
def test_what_is_wrong_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["plan", *arguments]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
