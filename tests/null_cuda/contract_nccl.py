"""The null NCCL under torch.distributed: collectives of real processes, and their faults."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.launches.trace import read_trace, split_at_marks
from scripts.null_cuda import environment, program

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ROOT / "build" / "null"

Records = list[dict[str, Any]]


def of_kind(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


RANKS = """
    import json, sys, torch
    import torch.distributed as dist
    rank = int(sys.argv[1])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2, init_method="file://" + sys.argv[2])
    here = lambda *numbers, dtype=torch.float32: torch.tensor(numbers, dtype=dtype).to("cuda")
    result = []
    for dtype, op in ((torch.float32, "SUM"), (torch.bfloat16, "AVG"), (torch.int64, "MAX")):
        x = here(1 + rank, 10 * (1 + rank), dtype=dtype)
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
        result.append(x.tolist())
    parts = [torch.empty(2, device="cuda") for _ in range(2)]
    dist.all_gather(parts, here(rank, rank + 0.5))
    result.append([part.tolist() for part in parts])
    out = torch.empty(1, device="cuda")
    dist.reduce_scatter_tensor(out, here(1 + rank, 3 + rank))
    result.append(out.tolist())
    x = here(7 - 7 * rank)
    dist.broadcast(x, 0)
    result.append(x.tolist())
    got = torch.empty(3, device="cuda")
    other = 1 - rank
    ops = dist.P2POp(dist.isend, here(rank, 5, 6), other), dist.P2POp(dist.irecv, got, other)
    for work in dist.batch_isend_irecv(list(ops)):
        work.wait()
    result.append(got.tolist())
    big = torch.arange(3 << 18, dtype=torch.float32).to("cuda")
    dist.all_reduce(big)
    result.append(big.cpu()[[0, 1 << 18, -1]].tolist())
    print(json.dumps(result))
    {more}
"""


def start_ranks(tmp_path: Path, more: str = "") -> list[subprocess.CompletedProcess[str]]:
    """Run RANKS on two devices, with a last statement more; return both processes."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS.format(more=more)))
    trace = tmp_path / "trace-%p.jsonl"
    variables = environment(LIBRARIES, devices=2, trace=trace, root=tmp_path, nccl_seconds=60)
    command = program(script)
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    done = []
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(command, rank.returncode, out, err))
    return done


def test_collectives_between_processes_have_real_results(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-2000:]
    end = float((3 << 18) - 1)
    for number, rank in enumerate(ranks):
        assert json.loads(rank.stdout.splitlines()[-1]) == [
            [3.0, 30.0],
            [1.5, 15.0],
            [2, 20],
            [[0.0, 0.5], [1.0, 1.5]],
            [3.0 + 4.0 * number],
            [7.0],
            [1.0 - number, 5.0, 6.0],
            [0.0, 2.0 * (1 << 18), 2 * end],
        ]
    traces = [of_kind(list(read_trace(p)), "collective") for p in tmp_path.glob("trace-*.jsonl")]
    calls = [[(r["call"], r["bytes"]) for r in trace] for trace in traces if trace]
    assert len(calls) == 2
    # What one sends the other receives; all else is called alike.
    p2p = ("ncclSend", "ncclRecv")
    first, second = ([c for c in each if c[0] not in p2p] for each in calls)
    assert first == second
    assert ("ncclAllReduce", 8) in first and ("ncclReduceScatter", 4) in first


def test_collectives_in_another_order_are_a_fault_with_its_line(tmp_path: Path) -> None:
    more = "dist.all_reduce(x) if rank else dist.broadcast(x, 0)"
    ranks = start_ranks(tmp_path, more + "\n    torch.cuda.synchronize()")
    assert all("null NCCL: rank" in rank.stderr for rank in ranks)
    traces = [list(read_trace(path)) for path in tmp_path.glob("trace-*.jsonl")]
    faults = [fault for trace in traces for fault in of_kind(trace, "fault")]
    assert len(faults) == 2
    assert "ncclBroadcast of 1 numbers" in faults[0]["what"]
    assert {fault["line"].rsplit(":", 1)[0] for fault in faults} == {f"{tmp_path}/ranks.py"}


DDP = """
    import ctypes, json, sys, torch
    import torch.distributed as dist
    from m3i_fast.config.parallel import ParallelConfig
    from m3i_fast.engine.parallel.ranks import World, distribute
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = "file://" + sys.argv[1]
    dist.init_process_group("nccl", rank=0, world_size=1, init_method=store, device_id=device)
    world = World(device, group=dist.group.WORLD)
    linear, x = torch.nn.Linear(8, 8, device=device), torch.ones(4, 8, device=device)
    model = distribute(linear, [], ParallelConfig(), world, compute_dtype=torch.float32)
    mark = ctypes.CDLL(None).null_cuda_mark
    for step in range(102):
        mark(f"step {step}".encode())
        model(x).sum().backward()
    mark(b"end")
    dist.destroy_process_group()
"""


def test_ddp_waits_for_the_device_in_its_first_ten_steps_alone(tmp_path: Path) -> None:
    """By itself it would time itself in every 100th step as well."""
    script, trace = tmp_path / "ddp.py", tmp_path / "trace.jsonl"
    script.write_text(textwrap.dedent(DDP))
    variables = environment(LIBRARIES, trace=trace, root=tmp_path)
    command = program(script, tmp_path / "store")
    subprocess.run(command, env=variables, check=True, timeout=300)
    steps = [step for step in split_at_marks(read_trace(trace)) if step.name.startswith("step ")]
    assert [int(step.name.split()[1]) for step in steps if step.of("wait")] == list(range(1, 11))
