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


def test_what_bounds_the_run_is_said_and_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ["--data.num-threads", "1", "--picture", "1500", "2000", "--cores", "8"]
    assert main([*DEMO, "--gpus", "2", "--card", "a100", *slow]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "decoding bounds the run (ddp): the loader gives" in shown
    assert "- m3i-fast data pack SOURCE DIR --for-gpu 256:" in shown
    assert "- --data.num-threads 7:" in shown
    assert "local-views" not in shown
    assert "a node reads 25 GB/s (--read-gb-s; assumed: the peak of a DGX A100's" in shown
    assert "pictures of 1500 x 2000 pixels and 1,760 kB" in shown
    assert main([*DEMO, "--card", "cpu", "--cores", "64", "--data.num-threads", "64"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "compute bounds the run: the loader gives" in shown


def test_exact_decode_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    exact = ["--data.exact-decode", "--picture", "1500", "2000", "--cores", "1.5"]
    assert main([*DEMO, "--card", "h100", *exact]) == 0
    shown = capsys.readouterr().out
    assert "JPEG engines," not in shown and "hw-decoder-load 0" not in shown


def test_json_has_the_loader_in_pictures_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    bucket = ["--data.path", "s3://bucket/set", "--picture-kb", "50000"]
    assert main([*DEMO, "--gpus", "8", "--card", "h100", "--json", *bucket]) == 0
    found = json.loads(capsys.readouterr().out)
    loader, speed = found["loader"], found["strategies"][0]["speed"]
    assert loader["rates"]["reading"] == pytest.approx(12.5e9 / 8 / 50e6)
    assert loader["images_s"] == min(loader["rates"].values()) == speed["loader_images_s"] / 8
    assert loader["bound"] == speed["bottleneck"] == "reading"
    assert found["asked_images_s"] > loader["images_s"]


def test_a_global_batch_is_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--gpus", "2", "--global-batch", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 4


def test_a_global_batch_is_shared_out_over_the_batches_of_a_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    several = ["--gpus", "2", "--global-batch", "32", "--parallel.accumulate", "2"]
    assert main(["plan", "demo_supervised", *several, "--precision", "fp8_current"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 images a rank x 2 batches, 32 a step, fp8_current (operations, memory and" in shown
    assert main(["plan", "demo", *several]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "m3i-fast train refuses this run: parallel.accumulate: expected 1 with" in shown


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
        (["demo", "--picture", "0", "5"], r"--picture: .*got \(0, 5\)"),
        (["demo", "--picture-kb", "0"], r"--picture-kb: expected more than 0, got 0"),
        (["demo", "--read-gb-s", "-1"], r"--read-gb-s: expected more than 0, got -1"),
        (["demo", "--cores", "0"], r"--cores: expected more than 0, got 0"),
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
