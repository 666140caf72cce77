"""Train a few steps on the GPU: losses, host synchronisations, whose kernels, memory.

    python first_step.py                  in fp32 and bf16; a steady step in bf16 is counted
    python first_step.py --compiled       in bf16, by torch.compile
    python first_step.py --fp8            in FP8
    torchrun --nproc-per-node 2 first_step.py --ranks     in fp32, by DDP and by FSDP2

The demo's recipe with two blocks, eight images. Losses are compared with those of the CPU in fp32,
and those of several GPUs with those of one. Prints `check ` and JSON for each, as
scripts/gpu/reading.py reads it; scripts/gpu/expected.json has what the null runtime counted.
--launch-only compares no losses.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from m3i_fast.backward_threads import release_last_backward
from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.benchmarks.launches.trace import launched, our_kernel
from m3i_fast.benchmarks.training.step import Config, build_our_step, our_step, train_config
from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.parallel.ranks import World, join_world, leave_world
from m3i_fast.engine.precision.arithmetic import capabilities_of
from m3i_fast.pipelines.batch import Batch
from m3i_fast.planning.step_memory import trace

EXPECTED = Path(__file__).resolve().parents[1] / "expected.json"
STEPS = 3
# Relative to each loss. The CPU's own losses in bf16 are 0.4% off those in fp32, in FP8 1.5%.
FP32, BF16, FP8 = 1e-3, 0.02, 0.05
LAUNCH_ONLY = "--launch-only" in sys.argv


def tell(
    what: str, expected: object, got: object, holds: bool | None, source: str, kind: str = "must"
) -> None:
    """Print a check."""
    check = {"what": what, "expected": str(expected), "got": str(got), "holds": holds}
    print(f"check {json.dumps(check | {'kind': kind, 'source': source})}", flush=True)


# ---- Losses --------------------------------------------------------------------------------------


def small_run(device: str, **settings: Any) -> TrainConfig:
    """Return the config of the small run, in fp32 unless the settings name another precision."""
    return replace(train_config(Config(batch_size=8, depth=2)), device=device, **settings)


def losses(*runs: TrainConfig) -> list[list[float]]:
    """Return the losses of the first steps of each run, from the first one's weights.

    The same seed draws other weights on another device.
    """
    steps = [build_our_step(train) for train in runs]
    weights = {name: value.clone() for name, value in steps[0].objective.state_dict().items()}
    found = []
    for train, step in zip(runs, steps, strict=True):
        step.objective.load_state_dict(weights)
        batch = draw_batch(train).to(train.device)
        found.append([float(step(batch)["loss/total"]) for _ in range(STEPS)])
    return found


def tell_losses(
    what: str, expected: list[float], got: list[float], tolerance: float, reference: str
) -> None:
    """Tell whether each loss is as expected; a NaN never is."""
    what = f"losses of {STEPS} steps, {what}"
    if LAUNCH_ONLY:
        tell(what, "launched", "launched; they were not looked at", True, reference)
        return
    pairs = zip(expected, got, strict=True)
    close = all(abs(a - b) <= tolerance * abs(a) for a, b in pairs)
    numbers = (", ".join(f"{loss:.5f}" for loss in each) for each in (expected, got))
    tell(what, *numbers, close, f"{reference}, to {tolerance:g} of each")


def compare_losses(runs: dict[str, tuple[TrainConfig, float]]) -> None:
    """Tell the losses of each run beside the CPU's in fp32. runs: config and tolerance by name."""
    on_cpu, *found = losses(small_run("cpu"), *(train for train, _ in runs.values()))
    for (name, (_, tolerance)), ours in zip(runs.items(), found, strict=True):
        tell_losses(name, on_cpu, ours, tolerance, "the CPU here in fp32")


def fp8_run() -> dict[str, tuple[TrainConfig, float]]:
    """Return the run in FP8; torchao is for compiled blocks, which Transformer Engine cannot be."""
    by_te = capabilities_of(torch.device("cuda")).te
    settings: dict[str, Any] = {"precision": "fp8_current", "fp8_min_dim": 16}
    train = small_run("cuda", compile=not (by_te or LAUNCH_ONLY), **settings)
    name = f"FP8 by {'Transformer Engine' if by_te else 'torchao'}"
    return {name: (train, FP8)}


# ---- Ranks ---------------------------------------------------------------------------------------


def losses_of_ranks(world: World) -> dict[str, list[float]]:
    """Return the losses of one process, and those of all ranks by DDP and by FSDP2, by name."""
    train = small_run(world.device.type)
    # Each rank draws which of its inputs are asked densely, so all of them have to be.
    mixing = replace(train.objective.mixing, dense_fraction=1.0)
    train = replace(train, objective=replace(train.objective, mixing=mixing))
    whole, alone = draw_batch(train), World(world.device)
    size = whole.batch_size // world.size
    rows = slice(size * world.rank, size * (world.rank + 1))
    parts = {name: getattr(whole, name) for name in whole.__slots__}
    part = Batch(**pytree.tree_map(lambda tensor: tensor[rows], parts))
    spread = replace(train, data=replace(train.data, batch_size=size))
    found = {}
    for name, (own, cfg, batch) in {
        "one": (alone, train, whole),
        "DDP": (world, spread, part),
        "FSDP2": (world, replace(spread, parallel=ParallelConfig(shard=-1)), part),
    }.items():
        step, given = build_our_step(cfg, own), batch.to(world.device)
        found[name] = [float(own.mean(step(given)["loss/total"].clone())) for _ in range(STEPS)]
    return found


def compare_ranks() -> None:
    """Tell the losses of all GPUs beside those of one."""
    world = join_world(torch.device("cuda"))
    alone, *others = losses_of_ranks(world).items()
    for name, ours in others:
        if world.is_main:
            tell_losses(f"{name} on {world.size} GPUs", alone[1], ours, FP32, "one GPU here")
    leave_world()


# ---- A steady step -------------------------------------------------------------------------------


def refuse_synchronisation(step: Callable[[], object], kind: str) -> None:
    """Tell whether a step makes the host wait for the device, as torch notices it."""
    torch.cuda.set_sync_debug_mode("error")
    got = "none"
    try:
        step()
    except RuntimeError as error:
        got = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tell("host synchronisations of a step", "none", got, got == "none", "tests/null_cuda", kind)


def count_step() -> dict[str, Any]:
    """Tell what a steady step in bf16 launches and holds; returns the counts.

    Counts must be those of expected.json if torch is of the version that they were counted with.
    """
    train = small_run("cuda", precision="bf16")
    step = our_step(train, draw_batch(train).to("cuda"))
    for _ in range(STEPS):
        step()
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    wanted = json.loads(EXPECTED.read_text()).get(capability)
    version = torch.__version__.split("+")[0]
    kind = "must" if wanted is not None and wanted["torch"] == version else "note"
    refuse_synchronisation(step, kind)
    torch.cuda.reset_peak_memory_stats()
    names = launched(step)
    ours = Counter(name for kernel in names if (name := our_kernel(kernel)))
    source = "scripts/gpu/expected.json, counted on the null runtime"
    if wanted is None:
        tell("our kernels in a step", f"no count for {capability}", dict(ours), None, source)
    else:
        source += f" with torch {wanted['torch']}"
        for name in sorted(ours.keys() | wanted["kernels"].keys()):
            expected, got = wanted["kernels"].get(name, 0), ours[name]
            tell(f"{name} in a step", expected, got, expected == got, source, kind)
        # A call of cuBLAS is one launch there, and may be several here.
        tell("kernels of a step in all", wanted["launches"], len(names), None, source)
    planned = sum(trace(train, bf16=True).peak.values()) / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**20
    mib = (f"{planned:.1f} MiB and the workspace of cuBLAS", f"{peak:.1f} MiB")
    tell("memory at the peak of a step", *mib, None, "m3i-fast plan's trace of the step")
    return {
        "torch": version,
        "launches": len(names),
        "kernels": dict(sorted(ours.items())),
    }


def main() -> None:
    """Print the checks, and the counts of a steady step as JSON."""
    if LAUNCH_ONLY:
        torch.backends.cudnn.enabled = False  # the null cuDNN has no engines that it could offer
    bf16 = small_run("cuda", precision="bf16")
    if "--ranks" in sys.argv:
        compare_ranks()
    elif "--fp8" in sys.argv:
        compare_losses(fp8_run())
    elif "--compiled" in sys.argv:
        compare_losses({"bf16, compiled": (replace(bf16, compile=True), BF16)})
    else:
        if not LAUNCH_ONLY:
            compare_losses({"fp32": (small_run("cuda"), FP32), "bf16": (bf16, BF16)})
        print(f"counts {json.dumps(count_step())}")
    release_last_backward()


if __name__ == "__main__":
    main()
