"""How many kernels a likelihood launches, whatever its size: of ours, none of torch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from m3i_fast.ops import boltzmann
from tests.shared.cuda import emulator


def launches(size: int, width: int, architecture: int, log: Path) -> Counter[str]:
    """Launches of our kernels in a forward and a backward, which are logged but not run."""
    z_hat, z = (torch.zeros(size, width, dtype=torch.bfloat16, requires_grad=True) for _ in "ab")
    scale = torch.tensor(100.0, requires_grad=True)
    with (
        emulator.emulated("boltzmann", architecture=architecture),
        emulator.logged_launches(log, run=False),
    ):
        boltzmann(z_hat, z, scale).backward()
    names = [json.loads(line)["name"] for line in log.read_text().splitlines()]
    return Counter(name.split("<")[0].split("::")[-1] for name in names)


@pytest.mark.parametrize("size", [300, 32768])
def test_by_warpgroups(size: int, tmp_path: Path) -> None:
    """Each pass over C is a launch and a reduction; a backward is one launch, and a total.

    Maxima and exact sums return at once unless sums with a common shift left their range. Seven
    kernels on vectors stand around them. torch fills the gradient of the loss by one more.
    """
    found = launches(size, 512, 90, tmp_path / "launches.jsonl")
    assert found.total() + 1 <= 20
    vectors = ("prepare", "shift", "exact", "exact_shift", "totals", "loss", "scale")
    assert found == {
        **{f"boltzmann_{name}_kernel": 1 for name in vectors},
        "boltzmann_sums_hopper_kernel": 1,
        "boltzmann_maxima_kernel": 1,
        "boltzmann_sums_kernel": 1,
        "boltzmann_reduce_kernel": 3,
        "boltzmann_grads_hopper_kernel": 1,
        "boltzmann_total_kernel": 1,
    }


def test_forward_by_mma(tmp_path: Path) -> None:
    """Two launches for each of three passes; a backward goes block by block."""
    counts = launches(32768, 64, 80, tmp_path / "launches.jsonl")
    assert counts["boltzmann_sums_kernel"] == 2 and counts["boltzmann_maxima_kernel"] == 1
    assert counts["boltzmann_reduce_kernel"] == 3
