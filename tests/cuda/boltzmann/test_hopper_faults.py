"""Faults planted in boltzmann's kernels by warpgroups, a line each, are reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.cuda.boltzmann.source import limit_blocks, shrink
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault, a_third_by_day
from tests.shared.ops.boltzmann_kernel_cases import make

DEADLOCK = r"deadlock: no thread of the cluster can go on.*"

FAULTS = {
    # A wait or an arrival too few
    "a full stage is not awaited": Fault(
        "sm90/warpgroup.cuh",
        "    mbarrier_wait(&ring.full[place.stage], place.parity);\n",
        "",
        "boltzmann_sums",
        r"asynchronous read of 16 bytes .*(has not written|under way|without a barrier|wrote)",
    ),
    "an empty stage is not awaited": Fault(
        "sm90/warpgroup.cuh",
        "    mbarrier_wait(&ring.empty[place.stage], place.parity ^ 1);\n",
        "",
        "boltzmann_sums",
        r"(write of 8192 bytes .* of dynamic shared memory|all 1 arrivals of phase \d have come)",
    ),
    "a stage is released while it is read": Fault(
        "sm90/warpgroup.cuh",
        "wgmma_wait<1>();  // the step before",
        "wgmma_wait<2>();",
        "boltzmann_sums",
        r"write of 8192 bytes .* of dynamic shared memory, which an asynchronous operation is "
        r"reading",
    ),
    "sums are read while products are under way": Fault(
        "sm90/warpgroup.cuh",
        "  wgmma_wait<0>(sum);\n",
        "  wgmma_wait<1>(sum);\n",
        "boltzmann_grads",
        r"(a thread returned without wgmma_wait|which an asynchronous operation is reading)",
    ),
    "the other block's warps are not awaited": Fault(
        "sm90/warpgroup.cuh",
        "mbarrier_arrive_remote_relaxed(&ring.empty[stage], lane);",
        "mbarrier_arrive_remote_relaxed(&ring.empty[stage], cluster_rank());",
        "boltzmann_sums",
        r"write of 8192 bytes .* of dynamic shared memory of block \(1, 0, 0\)",
    ),
    "a block returns before the other one": Fault(
        "sm90/warpgroup.cuh",
        "  cluster_sync();  // the other block may still arrive at barriers here\n",
        "",
        "boltzmann_sums",
        r"block \(0, 0, 0\) returns, while thread .* may still use its shared memory",
    ),
    # Waits that never end
    "the producer waits for the wrong parity": Fault(
        "sm90/warpgroup.cuh",
        "place.parity ^ 1);",
        "place.parity);",
        "boltzmann_sums",
        DEADLOCK + r"waits for 16 of 16 arrivals",
    ),
    "one warp of eight does not release": Fault(
        "sm90/warpgroup.cuh",
        "if (lane < kClusterBlocks) mbarrier_arrive",
        "if (lane < kClusterBlocks && threadIdx.x != lane) mbarrier_arrive",
        "boltzmann_sums",
        DEADLOCK + r"waits for 2 of 16 arrivals",
    ),
    "a box is not copied": Fault(
        "sm90/warpgroup.cuh",
        "for (int i = 0; i < kBlockRows / kBoxSide; ++i) {",
        "for (int i = 1; i < kBlockRows / kBoxSide; ++i) {",
        "boltzmann_grads",
        DEADLOCK + r"waits for 0 of 1 arrivals and for 8192 bytes",
    ),
    "a ticket is not awaited": Fault(
        "sm90/work.cuh",
        "  mbarrier_wait_cluster(&tickets.full[place.slot], place.parity);\n",
        "",
        "boltzmann_grads",
        r"(read before written|data race): read of 8 bytes .* of dynamic shared memory",
    ),
    "G is multiplied before it is there": Fault(
        "sm90/grads.cuh",
        "            counter_wait(memory.counters + kDone, work.first * kHalves);\n",
        "",
        "boltzmann_grads",
        r"data race: write of 16 bytes .* of an allocation",
    ),
    # Outside
    "a row too many": Fault(
        "sm90/launch.cu",
        "make_map(&maps->z_hat, input.dtype, input.z_hat, input.rows, input.width);",
        "make_map(&maps->z_hat, input.dtype, input.z_hat, input.rows + 1, input.width);",
        "boltzmann_sums",
        r"out-of-bounds read .* past the end of an allocation",
    ),
    # Ordinary memory
    "both warpgroups take the same half": Fault(
        "sm90/sums.cuh",
        "/ kHalfRows + consumer),",
        "/ kHalfRows + 0 * consumer),",
        "boltzmann_sums",
        r"data race: write of 4 bytes",
    ),
    "ids of other threads are not awaited": Fault(
        "sm90/sums.cuh",
        "          sync_warpgroup();\n          const WarpRows",
        "          const WarpRows",
        "boltzmann_sums",
        r"(read before written|data race): read of 4 bytes .* of dynamic shared memory",
    ),
    "a warp's positives are added where others were": Fault(
        "sm90/positives.cuh",
        "  if (columns) clear_folds(shared);\n",
        "",
        "boltzmann_sums",
        r"read before written: read of \d bytes .* of dynamic shared memory",
    ),
    "folds of other warps are not awaited": Fault(
        "sm90/sums.cuh",
        "  sync_warpgroup();\n#pragma unroll",
        "#pragma unroll",
        "boltzmann_sums",
        r"(read before written|data race): read of \d bytes .* of dynamic shared memory",
    ),
}

# Two clusters share the blocks of C of a backward.
ORDER_FAULTS = {
    "G is overwritten while other clusters multiply it": Fault(
        "sm90/grads.cuh",
        "  wait_for_turn(work, memory.counters);  // G of the block before was multiplied\n",
        "",
        "boltzmann_grads",
        r"data race: write of 16 bytes .* which an asynchronous operation read",
    ),
    "a half is done before all warps have stored it": Fault(
        "sm90/work.cuh",
        "  sync_warpgroup();\n  if (threadIdx.x % kWarpgroupThreads == 0) counter_add",
        "  if (threadIdx.x % kWarpgroupThreads == 0) counter_add",
        "boltzmann_grads",
        r"data race: read of 128 bytes .* of block \(1, 0, 0\) wrote without a barrier",
    ),
    "stores of G are not fenced": Fault(
        "sm90/work.cuh",
        "  fence_proxy_async_global();\n  sync_warpgroup();",
        "  sync_warpgroup();",
        "boltzmann_grads",
        r"a tensor copy .* of block \(1, 0, 0\) wrote without fence_proxy_async_global of its own",
    ),
    "copies of G are not fenced": Fault(
        "sm90/grads.cuh",
        "            fence_proxy_async_global();\n",
        "",
        "boltzmann_grads",
        r"a tensor copy .* wrote without fence_proxy_async_global of the copying thread",
    ),
}


def test_every_fault_is_of_a_line_that_is_there_once() -> None:
    """Also one that is planted by night."""
    for fault in (*FAULTS.values(), *ORDER_FAULTS.values()):
        fault.planted((emulator.CUDA / "boltzmann" / fault.source).read_text())


def expect_report(
    fault: Fault, folder: Path, shape: tuple[int, int, int], clusters: int = 1
) -> None:
    copied = folder / "boltzmann"
    shutil.copytree(emulator.CUDA / "boltzmann", copied)
    shrink(copied)
    limit_blocks(copied, clusters)
    fault.plant(copied / fault.source)
    call = make(shape, torch.bfloat16, "shared", labels=True)
    run = {"boltzmann_sums": call.sums, "boltzmann_grads": call.grads}[fault.launcher]
    with (
        emulator.emulated("boltzmann", folder=folder, architecture=90),
        emulator.clusters_at_once(clusters),
        pytest.raises(RuntimeError, match=f"(?s){fault.report}.*boltzmann"),
    ):
        run()


@pytest.mark.parametrize("fault", a_third_by_day(FAULTS))
def test_planted_fault_is_reported(fault: Fault, tmp_path: Path) -> None:
    """Six steps go round the ring of four stages; one cluster takes all tiles."""
    expect_report(fault, tmp_path, (140, 150, 328))


@pytest.mark.parametrize("fault", a_third_by_day(ORDER_FAULTS))
def test_planted_fault_between_clusters_is_reported(fault: Fault, tmp_path: Path) -> None:
    """Three blocks of C one after the other, of two tiles or one, and the clusters take turns."""
    expect_report(fault, tmp_path, (530, 290, 328), clusters=2)


def test_a_stage_too_many_for_the_shared_memory_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "boltzmann"
    shutil.copytree(emulator.CUDA / "boltzmann", folder)
    source = folder / "tiles.h"
    stages = "kHopperStages = 4;"
    assert source.read_text().count(stages) == 1
    source.write_text(source.read_text().replace(stages, "kHopperStages = 5;"))
    call = make((140, 150, 328), torch.bfloat16, "shared", labels=True)
    with (
        emulator.emulated("boltzmann", folder=tmp_path, architecture=90),
        pytest.raises(RuntimeError, match=r"^CUDA error: invalid argument\n$"),
    ):
        call.sums()
