"""`bench node` through the command line: the row that it leaves, what it refuses, and its sweep."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.benchmarks.core.timed_windows import Schedule
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.node import main as node_main
from m3i_fast.benchmarks.node import sweep as node_sweep
from m3i_fast.benchmarks.node import sweep_point as node_point
from m3i_fast.benchmarks.node.planned import cores_of_node
from m3i_fast.benchmarks.node.sweep import (
    AXES,
    Point,
    last_words,
    mark_best,
    measure_points,
    parse_sweep,
)
from m3i_fast.benchmarks.node.sweep_point import is_out_of_memory
from m3i_fast.benchmarks.node.workloads import BOTH, LOADER, NO_EXCHANGE, SYNTHETIC
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.costs.traffic import Nodes
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import demo, recipes, shrink
from tests.shared.engine.small_run import TEXT

QUICK = "--windows 3 --window-seconds 0.05 --warmup-steps 1 --max-warmup-seconds 0".split()
TINY = replace(shrink(demo(), path=Path("nowhere"), num_classes=9, text=TEXT), num_steps=5)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file of a run on shards that are not there; rows go beside it."""
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    TINY.save(tmp_path / "tiny.json")
    return str(tmp_path / "tiny.json")


@pytest.mark.parametrize(
    ("allowed", "ranks_per_node", "expected"),
    [
        ([range(8)] * 2, 2, 8),
        ([range(4), range(4, 8)], 2, 8),  # each rank is bound to its own
        ([range(6), range(2, 8)], 2, 8),
        ([range(4), range(4, 8), range(9), range(9)], 2, 8),  # the second node has others
        ([range(0)] * 2, 2, os.cpu_count()),  # the system does not tell
    ],
)
def test_cores_of_a_node_are_those_of_its_ranks_together(
    allowed: list[range], ranks_per_node: int, expected: int
) -> None:
    nodes = Nodes(len(allowed), ranks_per_node)
    assert cores_of_node(list(map(frozenset, allowed)), nodes) == expected


def _row() -> dict[str, Any]:
    (row,) = ledger.read_rows("node")
    return row


def test_a_run_leaves_a_whole_row(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "node", "--config", config, "--synthetic-data", *QUICK]) == 0
    row = _row()
    figures, measured = row["figures"], row["figures"]["measurements"]
    assert list(measured) == [LOADER, SYNTHETIC, BOTH]
    for each in measured.values():
        rates = each["per_gpu"]
        assert rates["num_samples"] == each["num_windows"] == 3
        assert 0 < rates["p5"] <= rates["median"] <= rates["p95"]
        assert rates == each["per_node"] and each["per_rank"] == [rates["median"]]
        # Four source images a step, whatever the number of its views.
        assert 4e3 / each["step_ms"] == pytest.approx(rates["median"])
    stages = measured[BOTH]["stages_ms"]
    assert sum(stages.values()) == pytest.approx(measured[BOTH]["step_ms"], rel=0.5)
    assert figures["images_s_per_node"] == measured[BOTH]["per_node"]["median"]
    assert figures["verdict"]["bottleneck"] in ("loader", "model", "balanced")
    assert figures["exchange_share"] is None and 0 <= figures["data_wait_share"] <= 1
    plan = figures["plan"]
    assert plan["picture_hw"] == [375, 500] and plan["card"] == "cpu"
    assert plan["loader"] == min(plan["loader_parts"].values())
    assert plan["both"] == min(plan["loader"], plan["training"])
    rates = {name: each["per_gpu"]["median"] for name, each in measured.items()}
    assert figures["loader_share"] == pytest.approx(rates[LOADER] / rates[SYNTHETIC])
    used = figures["efficiency"]
    assert used["peak_of"] == "a matrix product of this machine, in the same run"
    assert used["mfu"] == pytest.approx(used["model_flop_s"] / used["peak_flop_s"])
    assert 0 < used["mfu"] < 1
    assert 0 < figures["final_loss"] < 100
    assert (figures["num_threads"], figures["loader_threads"]) == (torch.get_num_threads(), 1)
    assert figures["loader_cores"].startswith(("left to the system", "cores "))
    assert figures["data"]["largest_hw"] == [375, 500] and figures["data"]["num_pictures"] == 8
    # The config that ran: the pictures' classes and vocabulary, and no place that is gone.
    assert row["config"]["num_classes"] == 8 and row["config"]["data"]["path"] == "synthetic"
    assert row["config"]["text"]["vocab_size"] == TEXT.vocab_size
    assert row["telemetry"]["num_samples"] > 0 and row["telemetry"]["gpus"] == []
    assert "/tmp" not in json.dumps([figures, row["config"]])
    shown = capsys.readouterr().out
    assert f"bottleneck: {figures['verdict']['bottleneck']}" in shown
    assert "energy: not known" in shown and "torch 1, loader 1" in shown
    told = next(line for line in shown.splitlines() if "loader over training" in line)
    assert told.split()[3:] == [
        f"{plan['loader'] / plan['training']:.2f}",
        f"{figures['loader_share']:.2f}",
    ]
    assert "bound by" in shown and "loader: threads" in shown
    assert f"threads of the first rank's loader: {figures['loader_cores']}" in shown


def test_shards_that_are_not_there_are_asked_for(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "node", "--config", config]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--data.path: no shards at nowhere" in said
    assert "m3i-fast data synthetic nowhere" in said and "--synthetic-data" in said
    mine = tmp_path / "mypics"
    mine.mkdir()
    (mine / "holiday.jpg").write_bytes(b"mine")
    assert main(["bench", "node", "--config", config, "--data.path", str(mine)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "m3i-fast data synthetic NEW_DIRECTORY" in said and f"synthetic {mine}" not in said
    assert main(["bench", "node", "demoo"]) == 2
    assert "Did you mean demo?" in capsys.readouterr().err


def test_a_sweep_measures_ranks_in_processes_of_their_own(config: str, tmp_path: Path) -> None:
    """Two ranks over gloo; a batch that halves do not divide is refused before any is started."""
    out = tmp_path / "out.json"
    sweep = ["--sweep", "batch=4,5", "--ranks", "2", "--json", str(out)]
    assert main(["bench", "node", "--config", config, "--synthetic-data", *QUICK, *sweep]) == 0
    figures = _row()["figures"]
    assert figures == json.loads(out.read_text())
    measured, refused = figures["sweep"]
    assert refused["status"] == "refused" and "multiple of 2" in refused["reason"]
    assert measured["status"] == "measured", measured["reason"]
    assert measured["is_best"] and measured["values"] == {"batch": 4}
    found = measured["figures"]
    assert found["num_ranks"] == 2 and found["num_nodes"] == 1
    assert list(found["measurements"]) == [LOADER, SYNTHETIC, BOTH, NO_EXCHANGE]
    for each in found["measurements"].values():
        node, one = each["per_node"], each["per_gpu"]
        assert node["median"] == pytest.approx(2 * one["median"]) and len(each["per_rank"]) == 2
    assert 0 <= found["exchange_share"] < 1
    assert "exchanging gradients adds" in found["verdict"]["evidence"][2]


class Machine:
    """Measures what fits: the more images, the faster, and slower in fp32."""

    def __init__(self, largest: int) -> None:
        self.largest, self.asked = largest, list[tuple[int, str]]()

    def __call__(self, cfg: TrainConfig, values: Mapping[str, Any]) -> Point:
        batch = cfg.data.batch_size
        self.asked.append((batch, cfg.precision))
        if batch > self.largest:
            return Point(values=values, status="out of memory", reason="no")
        rate = batch * (1.0 if cfg.precision == "fp32" else 2.0)
        return Point(values=values, status="measured", figures={"images_s_per_node": rate})


def test_a_batch_that_does_not_fit_is_halved_until_one_does() -> None:
    machine = Machine(largest=20)
    points = mark_best(list(measure_points(TINY, {"batch": [8, 100]}, machine)))
    assert [p.values["batch"] for p in points] == [8, 100, 50, 24, 12]
    assert [p.status for p in points] == ["measured", *["out of memory"] * 3, "measured"]
    assert points[-1].reason == "batch 24 did not fit"
    assert [p.is_best for p in points] == [False] * 4 + [True]


def test_a_half_that_is_asked_for_anyway_is_measured_once() -> None:
    machine = Machine(largest=20)
    axes = {"precision": ["fp32", "bf16"], "batch": [32, 16]}
    points = mark_best(list(measure_points(TINY, axes, machine)))
    assert machine.asked == [(32, "fp32"), (16, "fp32"), (32, "bf16"), (16, "bf16")]
    (best,) = (p for p in points if p.is_best)
    assert best.values == {"batch": 16, "precision": "bf16"}


def test_a_machine_on_which_nothing_fits_has_no_best() -> None:
    points = mark_best(list(measure_points(TINY, {"batch": [8]}, Machine(largest=1))))
    assert [p.values["batch"] for p in points] == [8, 4, 2]
    assert not any(p.is_best for p in points)


def test_axes_are_set_in_the_config_and_have_usual_values() -> None:
    axes = parse_sweep(["batch", "precision=bf16", "loader-threads=3", "hw-decoder-load"], TINY)
    assert axes["batch"] == [2, 4, 8] and axes["precision"] == ["bf16"]
    assert axes["hw-decoder-load"][0] == 0.0 and axes["hw-decoder-load"][-1] == 1.0
    cfg = TINY
    for name, values in axes.items():
        cfg = AXES[name].set(cfg, values[0])
    assert (cfg.data.batch_size, cfg.precision, cfg.data.num_threads) == (2, "bf16", 3)
    assert cfg.data.hw_decoder_load == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batches", "--sweep: expected some of batch, .*, got 'batches'. Did you mean batch?"),
        ("batch=big", "--sweep batch: expected ints as batch=2,4, got 'big'"),
        ("hw-decoder-load=", "--sweep hw-decoder-load: expected floats as .*, got ''"),
    ],
)
def test_an_axis_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_sweep([text], TINY)


def test_a_sweep_in_several_processes_is_refused(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "node", "--config", config, "--sweep", "batch"]) == 2
    assert "--ranks 2, got 2 processes" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("precision: no"), "refused"), (torch.OutOfMemoryError("CUDA"), "out of memory")],
)
def test_a_point_that_fails_says_why(
    error: Exception, status: str, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cfg: TrainConfig, schedule: Schedule, *, make_data: bool) -> None:
        assert cfg == TINY and schedule == Schedule(num_windows=4) and not make_data
        raise error

    monkeypatch.setattr(node_point, "measure_node", fail)
    job = json.dumps(asdict(Schedule(num_windows=4)))
    monkeypatch.setattr(sys, "argv", ["", config, job, str(tmp_path / "result.json")])
    node_point.main()
    outcome = json.loads((tmp_path / "result.json").read_text())
    assert outcome == {"status": status, "reason": str(error)}

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(node_point, "in_a_world", lambda: True)
    monkeypatch.setattr(node_point, "end_at_once", ended)
    with pytest.raises(SystemExit, match="1"):  # torchrun ends the others where a code is not 0
        node_point.main()


def test_a_process_that_ends_without_a_word_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, of a Python that cannot know what it is asked for."""
    monkeypatch.setattr(node_sweep, "POINT", "m3i_fast_of_another_name")
    point = node_sweep.run_point(TINY, {"batch": 4}, Schedule(), num_ranks=1)
    assert point.status == "failed"
    assert "exit code 1" in point.reason and "No module named" in point.reason


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)  # 256 TiB
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


TORCHRUN = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "x.py", line 3, in <module>
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
W1202 06:00:00.000000 1 torch/distributed/elastic/multiprocessing/api.py:908] Sending SIGTERM
Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
x.py FAILED
------------------------------------------------------------
  traceback : To enable traceback see: https://pytorch.org/docs
============================================================
"""


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (TORCHRUN, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),
        ("python: No module named x\n", "python: No module named x"),
        ("", ""),
    ],
)
def test_the_reason_of_a_failed_point_is_its_first_error(stderr: str, expected: str) -> None:
    assert last_words(stderr) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "8"], "launch --nproc-per-node 8 bench node demo measures"),
        (["--json", "nowhere/figures.json"], "--json: expected a file in a folder that is there"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_refused_first(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        node_main.main(["demo", *flags])


def test_a_recipe_of_any_shape_is_sent_elsewhere() -> None:
    with pytest.raises(ValueError, match="measure such a recipe by m3i-fast profile, or bench"):
        node_main.main([next(name for name in recipes() if name.startswith("any_shape"))])


def test_pictures_for_one_run_are_refused_over_several_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(torch.device("cpu"), rank=0, size=16)
    monkeypatch.setattr(node_main, "join_world", lambda device: world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="--synthetic-data: expected one node, .* got 2: make"):
        node_main.measure_node(demo(), Schedule(), make_data=True)


def test_the_demo_is_measured_on_drawings_of_another_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `m3i-fast data openmoji` packs them by default."""
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    data = openmoji.build(tmp_path / "openmoji", limit=40)
    flags = f"--data.path {data} --data.batch-size 4 --device cpu".split()
    assert main(["bench", "node", "demo", *flags, *QUICK]) == 0
    vocabulary = read_manifest(data).tokenizer.vocab_size
    assert vocabulary != demo().text.vocab_size
    assert _row()["config"]["text"]["vocab_size"] == vocabulary
