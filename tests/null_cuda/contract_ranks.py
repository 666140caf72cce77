"""Ranks on the null device, as real processes over the null NCCL: DDP, FSDP2 and HSDP.

What a steady step sends is held against the plan, call by call; numbers against gloo on the CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.launches.ranks_run import NUM_STEPS, WHOLE_BATCH, for_ranks
from m3i_fast.benchmarks.launches.trace import Record, StepTrace, read_trace, split_at_marks
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.traffic import Collective, Nodes
from m3i_fast.planning.plan import Strategy, make_plan
from m3i_fast.recipes import recipes
from scripts.null_cuda import environment

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"
PRECISION = {2: "fp32", 4: "bf16"}
LAYOUTS = [(2, 1, "ddp"), (2, -1, "fsdp"), (4, 2, "hsdp"), (4, -1, "fsdp")]
NCCL = {
    "all_reduce": "ncclAllReduce",
    "all_gather": "ncclAllGather",
    "reduce_scatter": "ncclReduceScatter",
    "send": "ncclSend",
}
Calls = Counter[tuple[str, int]]


@dataclass(frozen=True)
class Launched:
    """What a launch left behind."""

    folder: Path
    code: int
    output: str
    traces: dict[int, list[StepTrace]]
    """By rank."""

    def found(self, num_ranks: int) -> dict[str, Any]:
        """Return what the ranks logged and saved, by `parallel.shard`."""
        found: dict[str, Any] = json.loads((self.folder / f"found-{num_ranks}.json").read_text())
        return found

    def steady(self, rank: int, shard: int) -> StepTrace:
        """Return the steady step of a rank."""
        (step,) = (step for step in self.traces[rank] if step.name == f"shard {shard} steady")
        return step

    def of_kind(self, kind: str) -> list[Record]:
        """Return the records of a kind of all ranks."""
        return [r for steps in self.traces.values() for step in steps for r in step.of(kind)]


def launch(folder: Path, num_ranks: int, *flags: str, **settings: object) -> Launched:
    """Launch `ranks_run` on the demo in a folder, where traces of an earlier launch go."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("trace-*.jsonl"):
        path.unlink()
    variables = environment(
        LIBRARIES,
        devices=num_ranks,
        trace=folder / "trace-%p.jsonl",
        root=ROOT / "m3i_fast",
        **{"nccl_seconds": 120, **settings},
    )
    command = [
        *(sys.executable, "-m", "m3i_fast.cli", "launch", "--nproc-per-node", str(num_ranks)),
        *("-m", "m3i_fast.benchmarks.launches.ranks_run", "demo", str(folder), *flags),
    ]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=1200, cwd=folder
    )
    traces = {}
    for path in folder.glob("trace-*.jsonl"):
        steps = split_at_marks(read_trace(path))
        of_all = (r for s in steps for r in s.of("collective") if r["ranks"] == num_ranks)
        if (first := next(of_all, None)) is not None:
            traces[first["rank"]] = steps
    return Launched(folder, done.returncode, done.stdout + done.stderr, traces)


def launch_well(folder: Path, num_ranks: int, *flags: str) -> Launched:
    launched = launch(folder, num_ranks, *flags)
    assert launched.code == 0, launched.output[-3000:]
    return launched


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Launched]:
    """The demo on two ranks in fp32, with DDP and FSDP2, and on four in bf16, with HSDP too."""
    launched = {}
    for num_ranks in (2, 4):
        shards = ",".join(str(shard) for ranks, shard, _ in LAYOUTS if ranks == num_ranks)
        flags = ("--shards", shards, "--precision", PRECISION[num_ranks])
        folder = tmp_path_factory.mktemp(f"ranks-{num_ranks}")
        launched[num_ranks] = launch_well(folder, num_ranks, *flags)
        assert sorted(launched[num_ranks].traces) == list(range(num_ranks))
    return launched


# ---- What a steady step asks for -----------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_no_rank_meets_an_error(on_ranks: dict[int, Launched], num_ranks: int) -> None:
    launched = on_ranks[num_ranks]
    assert not launched.of_kind("fault") and not launched.of_kind("error")
    # torch asks the driver for its log, and telemetry NVML for more figures; both do without.
    refused = {r["call"] for r in launched.of_kind("unsupported") if r["library"] != "nvml"}
    assert refused <= {"cuLogsRegisterCallback"}


@pytest.mark.parametrize(("num_ranks", "shard", "_"), LAYOUTS)
def test_a_steady_step_neither_waits_nor_allocates(
    on_ranks: dict[int, Launched], num_ranks: int, shard: int, _: str
) -> None:
    for rank in range(num_ranks):
        step = on_ranks[num_ranks].steady(rank, shard)
        assert step.num_launches > 1000
        assert not step.of("wait") and not step.of("allocate")
        assert not [c for c in step.of("copy") if "pageable" in (c["from"], c["to"])]


@pytest.mark.parametrize(("num_ranks", "shard", "_"), LAYOUTS)
def test_ranks_call_the_same_in_the_same_order(
    on_ranks: dict[int, Launched], num_ranks: int, shard: int, _: str
) -> None:
    """Types and operations are compared by the null NCCL, with a fault."""
    keys = ("call", "bytes", "ranks", "stream")
    first, *others = (
        [[r[key] for key in keys] for r in on_ranks[num_ranks].steady(rank, shard).of("collective")]
        for rank in range(num_ranks)
    )
    assert len(first) > 30
    assert all(other == first for other in others)


# ---- What is sent, and what the plan says --------------------------------------------------------


@cache
def planned(num_ranks: int, shard: int, name: str, chunk: int = 0) -> Strategy:
    """Return what `m3i-fast plan` says of a layout."""
    cfg = for_ranks(recipes()["demo"](), num_ranks=num_ranks, shard=shard)
    parallel = replace(cfg.parallel, chunk=chunk)
    cfg = replace(cfg, precision=PRECISION[num_ranks], parallel=parallel)
    plan = make_plan(cfg, card=CARDS["h100"], nodes=Nodes(num_ranks, 8))
    (strategy,) = (strategy for strategy in plan.strategies if strategy.name == name)
    return strategy


def calls_of(collectives: list[Collective]) -> Calls:
    calls: Calls = Counter()
    for one in collectives:
        calls[NCCL[one.call], one.size] += one.count
    return calls


def statistics(num_ranks: int) -> Calls:
    """Return what the plan leaves out: what losses, batch norms and the guard add up."""
    cfg = recipes()["demo"]()
    dim, rows = cfg.text.embed_dim, WHOLE_BATCH // num_ranks
    moments = 2 * 128 + 1  # of a projector of 128 features
    return Counter(
        {
            # A decorrelation of all terms: correlations and means, forward and backward.
            ("ncclAllReduce", 4 * dim * dim): 2,
            ("ncclAllReduce", 4 * dim): 2,
            # Members and rows of the label terms, and their weights; extremes of the likelihood.
            ("ncclAllReduce", 4 * 4): 2 + 1,
            ("ncclAllReduce", 4): 3 + 1,  # and whether the likelihood's sums are exact
            # The likelihood over all rows: sums by column, the gradients of two scalars.
            ("ncclAllReduce", 4 * WHOLE_BATCH): 1,
            ("ncclAllReduce", 4 * 4 * WHOLE_BATCH): 2,
            ("ncclAllReduce", 4 * 2): 1 + 1,  # and the guard's flag and loss
            # Its ids of columns, of which a picture has one, and biases.
            ("ncclAllGather", 8 * rows): 1,
            ("ncclAllGather", 4 * rows): 1,
            ("ncclAllGather", 4 * moments): 2,
        }
    )


@pytest.mark.parametrize(("num_ranks", "shard", "name"), LAYOUTS)
def test_calls_and_bytes_are_those_of_the_plan(
    on_ranks: dict[int, Launched], num_ranks: int, shard: int, name: str
) -> None:
    """All of them, but for how many buckets DDP makes of its gradients."""
    strategy = planned(num_ranks, shard, name)
    records = on_ranks[num_ranks].steady(0, shard).of("collective")
    counted: Calls = Counter((r["call"], r["bytes"]) for r in records)
    expected = statistics(num_ranks) + calls_of(sum(strategy.collectives.values(), []))
    expected += Counter(
        {("ncclRecv", size): n for (call, size), n in expected.items() if call == "ncclSend"}
    )
    if name == "ddp":
        (gradients,) = strategy.collectives["gradients"]
        buckets = counted - expected
        assert {call for call, _ in buckets} == {"ncclAllReduce"}
        assert sum(size * n for (_, size), n in buckets.items()) == gradients.size
        counted, expected = counted - buckets, expected - calls_of([gradients])
    assert counted == expected


@pytest.mark.nightly
def test_gradient_caching_gathers_as_often_as_the_plan_says(tmp_path: Path) -> None:
    flags = ("--shards", "-1", "--precision", "fp32", "--parallel.chunk", "3")
    records = launch_well(tmp_path, 2, *flags).steady(0, -1).of("collective")
    counted = Counter((r["call"], r["bytes"]) for r in records if r["call"] != "ncclRecv")
    strategy = planned(2, -1, "fsdp", chunk=3)
    assert counted == statistics(2) + calls_of(sum(strategy.collectives.values(), []))


@pytest.mark.parametrize(("num_ranks", "shard", "name"), LAYOUTS)
def test_what_computation_does_not_wait_for_has_streams_of_its_own(
    on_ranks: dict[int, Launched], num_ranks: int, shard: int, name: str
) -> None:
    """Statistics are needed at once, in the stream that computes; rows of the ring are not."""
    step = on_ranks[num_ranks].steady(0, shard)
    computing = Counter(r["stream"] for r in step.of("launch")).most_common(1)[0][0]
    weights = planned(num_ranks, shard, name).collectives
    moved = {key for key in calls_of(sum(weights.values(), [])) if key not in statistics(num_ranks)}
    streams: dict[str, set[int]] = {}
    for record in step.of("collective"):
        call, size = record["call"], record["bytes"]
        is_bucket = name == "ddp" and record["bytes"] > 2**20
        if (call, size) in moved - {("ncclAllReduce", 8), ("ncclAllReduce", 4)} or is_bucket:
            streams.setdefault(call, set()).add(record["stream"])
        elif call != "ncclRecv":
            assert record["stream"] == computing, record
    assert all(len(of_call) == 1 and computing not in of_call for of_call in streams.values())
    kinds = {"ddp": {"ncclAllReduce"}, "fsdp": {"ncclAllGather", "ncclReduceScatter"}}
    kinds["hsdp"] = kinds["fsdp"] | kinds["ddp"]
    assert streams.keys() == kinds[name] | {"ncclSend"}
    if name != "ddp":
        assert streams["ncclAllGather"] != streams["ncclReduceScatter"]


# ---- Numbers -------------------------------------------------------------------------------------


def test_losses_are_those_of_gloo_on_the_cpu(on_ranks: dict[int, Launched], tmp_path: Path) -> None:
    """DDP and FSDP2 in fp32 on the null device, the same batches with DDP on the CPU."""
    flags = ("--shards", "1", "--precision", "fp32", "--device", "cpu")
    on_cpu = launch_well(tmp_path / "cpu", 2, *flags).found(2)["1"]["rows"]
    assert [row["step"] for row in on_cpu] == list(range(1, NUM_STEPS + 1))
    on_null = on_ranks[2].found(2)
    for shard in ("1", "-1"):
        for ours, theirs in zip(on_null[shard]["rows"], on_cpu, strict=True):
            names = [name for name in theirs if name.startswith("loss/")] + ["optim/grad_norm"]
            assert len(names) >= 6
            assert ours["guard/skipped"] == 0
            assert {name: ours[name] for name in names} == pytest.approx(
                {name: theirs[name] for name in names}, rel=1e-5
            )


# ---- Other numbers of ranks ----------------------------------------------------------------------


def expect_loaded(saved: Launched, saved_on: int, num_ranks: int, shards: tuple[int, int]) -> None:
    """Resume what was saved, with its shard and as another, and compare all tensors' bits."""
    of, as_ = shards
    digests = saved.found(saved_on)[str(of)]["digests"]
    assert len(digests) > 100
    folder = saved.folder / f"shard_{of}"
    if of != as_:
        folder = folder.rename(saved.folder / f"shard_{as_}-as")
        folder = folder.rename(saved.folder / f"shard_{as_}")
    loaded = launch_well(
        saved.folder, num_ranks, "--shards", str(as_), "--resume",
        "--precision", PRECISION[saved_on],
    )  # fmt: skip
    found = loaded.found(num_ranks)[str(as_)]["digests"]
    assert found == digests


def test_four_ranks_become_two(on_ranks: dict[int, Launched]) -> None:
    expect_loaded(on_ranks[4], 4, 2, (-1, -1))


@pytest.mark.nightly
def test_hsdp_of_four_becomes_one(on_ranks: dict[int, Launched]) -> None:
    expect_loaded(on_ranks[4], 4, 1, (2, 1))


@pytest.mark.nightly
def test_two_ranks_become_four(on_ranks: dict[int, Launched]) -> None:
    expect_loaded(on_ranks[2], 2, 4, (-1, -1))


# ---- Ranks that fail -----------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_signal_to_one_rank_stops_all_saved(tmp_path: Path) -> None:
    """75: saved, to be started again."""
    flags = ("--shards", "-1", "--num-steps", "9", "--checkpoint-every", "9")
    stopped = launch(tmp_path, 2, *flags, "--plant", "term")
    assert stopped.code == 75, stopped.output[-3000:]
    of_shard = stopped.found(2)["-1"]
    assert of_shard["signal"] == 15
    taken = len(of_shard["rows"])
    assert 2 <= taken <= 4
    (saved,) = (tmp_path / "shard_-1" / "checkpoints").glob("step_*")
    assert int(saved.name.removeprefix("step_")) == taken


@pytest.mark.nightly
def test_a_collective_that_one_rank_leaves_out_is_named_with_both_ranks(tmp_path: Path) -> None:
    failed = launch(tmp_path, 2, "--shards", "1", "--plant", "skip", nccl_seconds=20)
    assert failed.code == 1
    assert "null NCCL: rank 0 calls ncclAllReduce of 2 numbers" in failed.output
    lines = {f["line"] for f in failed.of_kind("fault") if "rank 0 calls" in f["what"]}
    place = str(ROOT / "m3i_fast" / "engine" / "parallel" / "ranks.py")
    assert lines and {line.rsplit(":", 1)[0] for line in lines} == {place}


@pytest.mark.nightly
def test_a_rank_that_is_killed_ends_the_others_and_is_named(tmp_path: Path) -> None:
    """137, as a shell has SIGKILL; torchrun names the rank, and so does the one that waits."""
    killed = launch(tmp_path, 2, "--shards", "1", "--plant", "kill", nccl_seconds=10)
    assert killed.code == 137, killed.output[-3000:]
    assert "exitcode: -9) local_rank: 1" in killed.output
    assert "rank 1 has not come to rank 0's ncclAllReduce" in killed.output
