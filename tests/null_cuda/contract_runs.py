"""Runs of `m3i-fast` on the null device, from the first step to what ends them.

All but the refused ones train the tests' small run on drawings that are decoded on the CPU, with
the numbers of a real run (`tests/null_cuda/verb.py`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch.utils._pytree import tree_leaves

from m3i_fast.benchmarks.launches.trace import Record, lines_of, read_trace, split_at_marks
from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.observe.metrics import read_jsonl
from scripts.null_cuda import environment, program
from tests.shared.engine.small_run import assert_same_run, small_run

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"
NUM_STEPS, EVERY, SPOILT, STOPPED = 12, 4, 2, 6


@dataclass(frozen=True)
class Done:
    """What a process left: what it wrote, its trace, the exit codes of its verbs, and races."""

    out: str
    err: str
    trace: list[Record]
    codes: list[int]
    races: list[str]

    @property
    def told(self) -> str:
        """The messages on one line, as they were before the terminal's width broke them."""
        return " ".join(self.err.split())


def verb(folder: Path, *words: object, options: Sequence[str] = (), **settings: object) -> Done:
    """Run verbs of `m3i-fast` on the null device, with the options of tests.null_cuda.verb."""
    folder.mkdir(exist_ok=True)
    trace = folder / "trace.jsonl"
    trace.unlink(missing_ok=True)
    command = program("-m", "tests.null_cuda.verb", *options, *words)
    done = subprocess.run(
        command,
        env=environment(LIBRARIES, trace=trace, root=ROOT, **settings),
        capture_output=True, text=True, timeout=900, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    end = json.loads(done.stdout.splitlines()[-1])
    return Done(done.stdout, done.stderr, list(read_trace(trace)), **end)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The small run in float32 on the device, on sixty drawings."""
    data = tmp_path_factory.mktemp("data") / "openmoji"
    size = "--limit 60 --labelled 0.5 --num-merges 300 --context-length 24".split()
    pack = [ROOT / ".venv" / "bin" / "m3i-fast", "data", "openmoji", data, *size]
    subprocess.run(pack, check=True, capture_output=True)
    return small_run(
        data, num_steps=NUM_STEPS, log_every=EVERY, checkpoint_every=EVERY, device="cuda",
        precision="fp32",
    )  # fmt: skip


def saved(cfg: TrainConfig, folder: Path, **changes: Any) -> Path:
    """Write the config with some of its fields changed; return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    replace(cfg, **changes).save(path)
    return path


@pytest.fixture(scope="module")
def undisturbed(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run to the end whose third step is not finite; races between streams are looked for."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run, options = folder / "run", ("--order", "--plant", f"nan:{SPOILT}")
    words = ("train", "--config", saved(config, folder), "--out", run)
    return run, verb(folder, *words, options=options)


def test_a_run_trains_to_its_end(undisturbed: tuple[Path, Done]) -> None:
    run, done = undisturbed
    assert done.codes == [0]
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert checkpoint.latest(run / "checkpoints").step == NUM_STEPS
    kinds = {record["kind"] for record in done.trace}
    assert not {"error", "fault"} & kinds


def test_no_two_streams_race_in_a_run(undisturbed: tuple[Path, Done]) -> None:
    assert not undisturbed[1].races


def test_a_step_that_is_not_finite_is_skipped_as_on_the_cpu(
    undisturbed: tuple[Path, Done],
) -> None:
    run, _ = undisturbed
    (row,) = map(json.loads, (run / "skipped.jsonl").read_text().splitlines())
    assert (row["step"], row["reason"]) == (SPOILT, "not finite")
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["guard/skipped"] for row in rows] == [1, 0, 0]


def test_a_stopped_run_is_saved_and_goes_on_as_if_it_had_not_stopped(
    config: TrainConfig, undisturbed: tuple[Path, Done], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("train", "--config", saved(config, tmp_path), "--out", run)
    planted = ("--plant", f"nan:{SPOILT}", "--plant", f"sigterm:{STOPPED - 1}")
    done = verb(tmp_path, *words, "--then", *words, "--resume", options=planted)
    assert done.codes == [75, 0]
    assert f"stopped and saved at step {STOPPED}: add --resume" in done.told
    assert f"at step {STOPPED}" in done.told.split("resumed", 1)[1]
    assert_same_run(run, undisturbed[0])


@pytest.fixture(scope="module")
def spoilt(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run with a race in its second step, and a weight that is not a number from its fifth on."""
    folder = tmp_path_factory.mktemp("spoilt")
    options = ("--order", "--plant", "race:1", "--plant", f"nan-weight:{EVERY}")
    words = ("train", "--config", saved(config, folder), "--out", folder / "run")
    return folder / "run", verb(folder, *words, options=options)


def test_a_race_planted_in_the_step_is_found_with_both_lines(spoilt: tuple[Path, Done]) -> None:
    lines = (ROOT / "tests" / "null_cuda" / "verb.py").read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if ".mul_(1)" in line)
    planted = f"aten.mul_.Tensor ({ROOT}/tests/null_cuda/verb.py:{number})"
    races = spoilt[1].races
    assert races and all(planted in race for race in races)
    assert any(f"then without a wait {planted}" in race for race in races)
    assert any(f"({ROOT}/m3i_fast/" in race.split("then without")[-1] for race in races)


def test_a_weight_that_is_not_finite_ends_the_run(spoilt: tuple[Path, Done]) -> None:
    run, done = spoilt
    assert done.codes == [1]
    assert "not finite" in done.told and "the last checkpoint is good" in done.told
    newest = checkpoint.latest(run / "checkpoints")
    assert newest.step == EVERY and newest.damage() is None


def test_memory_that_is_used_up_names_the_flags_to_change(
    config: TrainConfig, tmp_path: Path
) -> None:
    words = ("train", "--config", saved(config, tmp_path), "--out", tmp_path / "run")
    done = verb(tmp_path, *words, memory=4 << 20)
    assert done.codes == [1]
    assert "CUDA out of memory. Tried to allocate" in done.told
    for flag in ("--parallel.chunk 4", "--vision.activation-checkpointing full", "m3i-fast plan"):
        assert flag in done.told


def launches_before(trace: list[Record], step: int) -> int:
    """Return the number of kernels launched before a step."""
    names = [r.get("name") if r["kind"] == "mark" else None for r in trace]
    return sum(r["kind"] == "launch" for r in trace[: names.index(f"step {step}")])


def test_an_error_of_the_gpu_ends_the_run_and_leaves_its_last_checkpoint(
    config: TrainConfig, undisturbed: tuple[Path, Done], tmp_path: Path
) -> None:
    """719 of a launch in the step after the checkpoint of step 4: nothing works from there on."""
    trace, run = undisturbed[1].trace, tmp_path / "run"
    begins, ends = (launches_before(trace, step) for step in (EVERY, EVERY + 1))
    at = begins + (ends - begins) // 10
    words = ("train", "--config", saved(config, tmp_path), "--out", run)
    planted = ("--plant", f"nan:{SPOILT}")
    done = verb(tmp_path, *words, options=planted, fail=f"cudaLaunchKernel:{at}:719")
    assert done.codes == [1]
    assert "CUDA error: cudaErrorLaunchFailure" in done.told
    assert f"The last checkpoint is of step {EVERY}: --resume continues {run} from it" in done.told
    newest = checkpoint.latest(run / "checkpoints")
    assert newest.step == EVERY and newest.damage() is None


def test_a_steady_step_with_the_loader_neither_waits_nor_copies_pageable_memory(
    config: TrainConfig, tmp_path: Path
) -> None:
    words = ("train", "--config", saved(config, tmp_path), "--out", tmp_path / "run")
    done = verb(tmp_path, *words, options=("--launched",))
    assert done.codes == [0]
    steps = split_at_marks(done.trace)
    names = [step.name for step in steps]
    first = names.index("step 5")
    steady = steps[first : names.index("step 7")]  # two steps, and their batches
    assert [step.name for step in steady] == ["step 5", "between", "step 6", "between"]
    for step in steady:
        assert not any(map(step.of, ("error", "fault", "unsupported")))
        assert not lines_of(step.of("wait")) and not lines_of(step.of("allocate"))
        copies = [c for c in step.of("copy") if "pageable" in (c["from"], c["to"])]
        assert not lines_of(copies)
        assert step.streams == {0}
        assert step.copied_bytes["pinned", "device"] > 0
    assert not [record for record in done.trace if record["kind"] == "fault"]


WITHOUT_ENGINE = "expected Transformer Engine, not installed; pip install"
REFUSED = (
    # An environment that `make te-contract` has used before has it.
    *([] if find_spec("transformer_engine") else [("h100", "fp8_delayed", WITHOUT_ENGINE)]),
    ("h100", "mxfp8", "expected Blackwell, sm_100; set --precision fp8_current"),
    ("a100", "fp8_current", "expected sm_89 or newer (L40S, H100, B200); set --precision bf16"),
)


def test_fp8_that_the_card_or_the_packages_lack_is_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    path, run = saved(config, tmp_path), tmp_path / "run"
    for card in ("h100", "a100"):
        of_card = [(precision, why) for name, precision, why in REFUSED if name == card]
        words: list[object] = []
        for precision, _ in of_card:
            words += ["--then", "train", "--config", path, "--out", run, "--precision", precision]
        done = verb(tmp_path, *words[1:], card=card)
        assert done.codes == [2] * len(of_card)
        for precision, why in of_card:
            sm = "sm_90" if card == "h100" else "sm_80"
            assert f"precision: {precision} on {sm}: {why}" in done.told
    assert not run.exists()


def test_a_profile_without_kernels_says_why(config: TrainConfig, tmp_path: Path) -> None:
    """The null CUPTI records nothing, as the real one where the driver does not let it."""
    words = ("profile", "--config", saved(config, tmp_path), "--out", tmp_path / "profile")
    steps = ("--profiler", "torch", "--warmup", 1, "--steps", 1)
    done = verb(tmp_path, *words, *steps, options=("--launched",))
    assert done.codes == [1]
    assert "--profiler: expected kernels of the cuda device" in done.told
    assert "CUPTI" in done.told and "--profiler nsys" in done.told


# ---- Other ways to train, and other verbs --------------------------------------------------------


@pytest.mark.nightly
def test_graphs_are_replayed_before_and_after_a_stop(config: TrainConfig, tmp_path: Path) -> None:
    """Launched alone, in bfloat16."""
    path = saved(config, tmp_path, cuda_graphs="modules", precision="bf16")
    words = ("train", "--config", path, "--out", tmp_path / "run")
    options = ("--launched", "--plant", f"sigterm:{STOPPED - 1}")
    done = verb(tmp_path, *words, "--then", *words, "--resume", options=options)
    assert done.codes == [75, 0]
    steps = {step.name: step for step in split_at_marks(done.trace)}
    for step in (STOPPED - 2, NUM_STEPS - 2):  # the third of each process's trainers, and later
        assert steps[f"step {step}"].of("replay")
    assert not [record for record in done.trace if record["kind"] in ("error", "fault")]


def losses(run: Path) -> list[float]:
    return [row["loss/total"] for row in read_jsonl(run / "metrics.jsonl")]


@pytest.mark.nightly
@pytest.mark.parametrize("way", ["deterministic", "chunk", "modules"])
def test_another_way_to_train_has_the_same_losses(
    config: TrainConfig, undisturbed: tuple[Path, Done], tmp_path: Path, way: str
) -> None:
    changes: dict[str, Any] = {"deterministic": True}
    if way == "chunk":
        changes = {"parallel": replace(config.parallel, chunk=4)}
    elif way == "modules":  # computed at each replay
        changes = {"cuda_graphs": "modules"}
    words = ("train", "--config", saved(config, tmp_path, **changes), "--out", tmp_path / "run")
    done = verb(tmp_path, *words, options=("--order", "--plant", f"nan:{SPOILT}"))
    assert (done.codes, done.races) == ([0], [])
    # Other orders of sums, which Muon's iterations in bfloat16 make larger
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed[0]), rel=1e-3)


@pytest.mark.nightly
def test_batches_are_added_up_and_the_run_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    """Of the one term whose loss is a mean of rows; the second of two devices is left alone."""
    (term,) = (term for term in config.objective.terms if term.target == "category")
    changes = {
        "objective": replace(config.objective, terms=(term,)),
        "parallel": replace(config.parallel, accumulate=2),
    }
    words = ("train", "--config", saved(config, tmp_path, **changes), "--out", tmp_path / "run")
    planted = ("--plant", f"sigterm:{STOPPED - 1}")
    done = verb(tmp_path, *words, "--then", *words, "--resume", options=planted, devices=2)
    assert done.codes == [75, 0]
    assert len(losses(tmp_path / "run")) == NUM_STEPS // EVERY
    assert {record["device"] for record in done.trace if record["kind"] == "launch"} == {0}


def figures_in(file: Path) -> list[float]:
    """Return the numbers of a JSON file, in order."""
    return [leaf for leaf in tree_leaves(json.loads(file.read_text())) if isinstance(leaf, float)]


@pytest.mark.nightly
def test_an_evaluation_has_the_figures_of_the_cpu(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("train", "--config", saved(config, tmp_path, num_steps=EVERY), "--out", run)
    assert verb(tmp_path, *words, "--then", "evaluate", run).codes == [0, 0]
    on_null = figures_in(run / "evaluation.json")
    replace(TrainConfig.load(run / "config.json"), device="cpu").save(run / "config.json")
    command = [ROOT / ".venv" / "bin" / "m3i-fast", "evaluate", run]
    subprocess.run(command, check=True, capture_output=True)
    on_cpu = figures_in(run / "evaluation.json")
    assert on_null == pytest.approx(on_cpu, rel=1e-4) and len(on_cpu) > 300


@pytest.mark.nightly
def test_the_node_is_measured_and_nothing_is_recorded(config: TrainConfig, tmp_path: Path) -> None:
    ledger = ROOT / "benchmarks" / "results" / "node.jsonl"
    before = ledger.read_bytes()
    words = ("bench", "node", "--config", saved(config, tmp_path), "--no-record")
    few = ("--windows", 3, "--window-seconds", 0.1, "--warmup-steps", 1, "--max-warmup-seconds", 1)
    done = verb(tmp_path, *words, *few, "--json", tmp_path / "n.json", options=("--launched",))
    assert done.codes == [0]
    figures = json.loads((tmp_path / "n.json").read_text())
    assert figures["images_s_per_gpu"] > 0 and figures["device"].startswith("cuda")
    assert ledger.read_bytes() == before


@pytest.mark.nightly
def test_the_step_is_measured_beside_others_whose_loss_it_has(tmp_path: Path) -> None:
    """The bench compares the losses of all before it takes a time."""
    sizes = ("--batch-size", 64, "--dim", 64, "--depth", 2, "--num-samples", 2)
    done = verb(tmp_path, "bench", "step", "--no-record", *sizes)
    assert done.codes == [0]
    assert "eager, asked only" in done.out


@pytest.mark.nightly
def test_a_plan_is_made_where_a_device_is_seen(tmp_path: Path) -> None:
    """It traces a step without a device, so that the one that is seen changes nothing of it."""
    done = verb(tmp_path, "plan", "demo", "--card", "h100", options=("--plain",))
    assert done.codes == [0]
    assert "fits" in done.out
    assert not [record for record in done.trace if record["kind"] in ("launch", "allocate")]
