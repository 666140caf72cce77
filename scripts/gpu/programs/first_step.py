"""Train a few steps on the GPU: the CPU's losses, no host synchronisation, whose kernels, memory.

    python first_step.py [--launch-only]

The demo's recipe with two blocks, eight images. In fp32 its losses are compared with the CPU's; in
bf16 a steady step is counted. Prints `check ` and JSON for each, as scripts/gpu/reading.py reads
it; scripts/gpu/expected.json has what the null runtime counted. --launch-only compares no losses.
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

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.benchmarks.launches.trace import launched, our_kernel
from m3i_fast.benchmarks.training.step import Config, build_our_step, our_step, train_config
from m3i_fast.planning.step_memory import trace

EXPECTED = Path(__file__).resolve().parents[1] / "expected.json"
STEPS = 3
TOLERANCE = 1e-3


def tell(what: str, expected: object, got: object, holds: bool | None, source: str) -> None:
    """Print a check."""
    check = {"what": what, "expected": str(expected), "got": str(got), "holds": holds}
    print(f"check {json.dumps(check | {'source': source})}", flush=True)


def losses(*devices: str) -> list[list[float]]:
    """Return the losses of the first steps in fp32 on each device, from the first one's weights.

    The same seed draws other weights on another device.
    """
    train = train_config(Config(batch_size=8, depth=2))
    steps = [build_our_step(replace(train, device=device)) for device in devices]
    weights = {name: value.clone() for name, value in steps[0].objective.state_dict().items()}
    found = []
    for device, step in zip(devices, steps, strict=True):
        step.objective.load_state_dict(weights)
        batch = draw_batch(train).to(device)
        found.append([float(step(batch)["loss/total"]) for _ in range(STEPS)])
    return found


def compare_losses() -> None:
    """Tell the losses of both devices."""
    on_cpu, on_gpu = losses("cpu", "cuda")
    close = all(abs(a - b) <= TOLERANCE * abs(a) for a, b in zip(on_cpu, on_gpu, strict=True))
    numbers = (", ".join(f"{loss:.5f}" for loss in each) for each in (on_cpu, on_gpu))
    tell("losses of three steps, fp32", *numbers, close, f"the CPU here, to {TOLERANCE:g} of each")


def refuse_synchronisation(step: Callable[[], object]) -> None:
    """Tell whether a step makes the host wait for the device, as torch notices it."""
    torch.cuda.set_sync_debug_mode("error")
    got = "none"
    try:
        step()
    except RuntimeError as error:
        got = str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tell("host synchronisations of a step", "none", got, got == "none", "tests/null_cuda")


def count_step() -> dict[str, Any]:
    """Tell what a steady step in bf16 launches and holds; returns the counts."""
    train = replace(train_config(Config(batch_size=8, depth=2)), device="cuda", precision="bf16")
    step = our_step(train, draw_batch(train).to("cuda"))
    for _ in range(STEPS):
        step()
    refuse_synchronisation(step)
    torch.cuda.reset_peak_memory_stats()
    names = launched(step)
    ours = Counter(name for kernel in names if (name := our_kernel(kernel)))
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    wanted = json.loads(EXPECTED.read_text()).get(capability)
    source = "scripts/gpu/expected.json, counted on the null runtime"
    if wanted is None:
        tell("our kernels in a step", f"no count for {capability}", dict(ours), None, source)
    else:
        for name in sorted(ours.keys() | wanted["kernels"].keys()):
            expected, got = wanted["kernels"].get(name, 0), ours[name]
            tell(f"{name} in a step", expected, got, expected == got, source)
        by_torch = f"{wanted['launches']}, of torch {wanted['torch']}"
        tell("kernels of a step in all", by_torch, len(names), None, source)
    planned = sum(trace(train, bf16=True).peak.values()) / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**20
    mib = (f"{planned:.1f} MiB and the workspace of cuBLAS", f"{peak:.1f} MiB")
    tell("memory at the peak of a step", *mib, None, "m3i-fast plan's trace of the step")
    return {
        "torch": torch.__version__.split("+")[0],
        "launches": len(names),
        "kernels": dict(sorted(ours.items())),
    }


def main() -> None:
    """Print the checks, then the counts as JSON."""
    if "--launch-only" in sys.argv:
        torch.backends.cudnn.enabled = False  # the null cuDNN has no engines that it could offer
    else:
        compare_losses()
    print(f"counts {json.dumps(count_step())}")


if __name__ == "__main__":
    main()
