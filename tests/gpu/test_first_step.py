"""The comparison of losses on GPUs with those of the CPU and of one GPU, here all on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.train_step import TrainStep
from scripts.gpu.programs import first_step
from scripts.gpu.programs.first_step import BF16, FP8, FP32, small_run

ROOT = Path(__file__).resolve().parents[2]


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix("check ")) for line in lines if line.startswith("check ")]


def test_losses_are_of_the_same_weights_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed draws other weights on a GPU, which a shift stands for here."""
    build, shifts = first_step.build_our_step, iter((0.0, 0.1))

    @torch.no_grad()
    def other_weights(train: TrainConfig) -> TrainStep:
        step, shift = build(train), next(shifts)
        for parameter in step.objective.parameters():
            parameter += shift
        return step

    monkeypatch.setattr(first_step, "build_our_step", other_weights)
    first, second = first_step.losses(small_run("cpu"), small_run("cpu"))
    assert first == second and len(set(first)) == first_step.STEPS


def test_low_precision_is_within_its_tolerance(capsys: pytest.CaptureFixture[str]) -> None:
    """And not within that of fp32, which tells that another precision was run."""
    fp8 = small_run("cpu", precision="fp8_current", fp8_min_dim=16)
    bf16 = small_run("cpu", precision="bf16")
    first_step.compare_losses({"bf16": (bf16, BF16), "FP8": (fp8, FP8), "other": (fp8, FP32)})
    checks = told(capsys)
    assert [check["holds"] for check in checks] == [True, True, False]
    assert {check["kind"] for check in checks} == {"must"}


@pytest.mark.parametrize("fault", [math.nan, math.inf, 1.03])
def test_a_wrong_loss_is_found(fault: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one step of three; also a NaN on both sides."""
    right = [11.3, 9.6, 9.5]
    wrong = [*right[:2], right[2] * fault]
    first_step.tell_losses("bf16", right, wrong, BF16, "the CPU")
    first_step.tell_losses("bf16", wrong, wrong, BF16, "the CPU")
    first_step.tell_losses("bf16", right, right, BF16, "the CPU")
    assert [check["holds"] for check in told(capsys)] == [False, fault == 1.03, True]


RANKS = """
import json, sys, torch
from m3i_fast.engine.parallel.ranks import World, join_world, leave_world
from scripts.gpu.programs import first_step

torch.set_num_threads(1)
world = join_world(torch.device("cpu"))
if "--plant" in sys.argv:
    from torch.nn.parallel import DistributedDataParallel
    class Alone(DistributedDataParallel):  # reduces no gradient
        def forward(self, *inputs, **options):
            with self.no_sync():
                return super().forward(*inputs, **options)
    from m3i_fast.engine.parallel import ranks
    ranks.DistributedDataParallel = Alone
found = first_step.losses_of_ranks(world)
if world.is_main:
    print(json.dumps(found))
leave_world()
"""


@pytest.mark.distributed
@pytest.mark.parametrize("plant", [(), ("--plant",)])
def test_losses_on_two_ranks_are_those_of_one(plant: tuple[str, ...], tmp_path: Path) -> None:
    """By DDP and by FSDP2; not if the ranks do not average their gradients."""
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(tmp_path / "ranks.py"), *plant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["FSDP2"] == pytest.approx(found["one"], rel=FP32 / 10)
    assert (found["DDP"] == pytest.approx(found["one"], rel=FP32)) == (not plant)
