"""All views of a batch on the null device: one launch, no wait, and the CPU's bits.

As in contract_numbers: `_C_cuda`'s host code asks the null runtime for the launch, the emulator
computes it, and its result is held to the CPU's kernel, here bit for bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from m3i_fast.benchmarks.launches.trace import read_trace
from scripts.null_cuda import environment
from tests.null_cuda.contract_numbers import LIBRARIES, ROOT, VIEWS, launch_of

PROGRAM = """
import sys
from pathlib import Path
import torch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost
from m3i_fast.ops.views import make_views
from tests.null_cuda.emulated_run import held_operators
from tests.shared.cuda import emulator
from tests.shared.ops.views_cases import CASES, make

case = CASES[sys.argv[2]]
inputs = make(case)
expected = make_views(*inputs, views=case.specs)
major, minor = torch.cuda.get_device_capability()
held = held_operators(["views"], emulator.CUDA, 10 * major + minor)
log = Path(sys.argv[1]) / "emulated.jsonl"
with emulator.logged_launches(log), ComputeOnHost(held):
    made = make_views(*(tensor.cuda() for tensor in inputs), views=case.specs)
    assert all(view.is_cuda for view in made)
    on_host = [view.cpu() for view in made]
assert all(map(torch.equal, on_host, expected))
(operator,) = held.values()
print(operator.calls)
"""


@pytest.mark.parametrize("card", ["h100", "a100"])
@pytest.mark.parametrize("case", ["two sizes, every step", "blurred out of scratch memory"])
def test_views_are_one_launch_with_the_bits_of_the_cpu(
    tmp_path: Path, case: str, card: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, case],
        env=environment(LIBRARIES, trace=tmp_path / "trace.jsonl", root=ROOT, card=card),
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split()[-1] == "1", done.stderr[-3000:]
    records = read_trace(tmp_path / "trace.jsonl")
    asked = [launch_of(r) for r in records if r["kind"] == "launch" and "m3i::" in r["name"]]
    lines = (tmp_path / "emulated.jsonl").read_text().splitlines()
    assert asked == [launch_of(json.loads(line)) for line in lines]
    (launch,) = asked
    assert {launch[0].split("<")[0].rsplit("::", 1)[-1]} == VIEWS
