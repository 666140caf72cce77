"""Train a recipe on the CPU, and on the null device with our kernels run by the emulator.

    python -m tests.null_cuda.emulated_run FOLDER RECIPE OP,OP [--fault NAME] [TRAIN FLAGS]

Run in the environment of `scripts.null_cuda.environment`. On the null device each operator of the
ops OP is dispatched to CUDA, which records its launches, and computed by its emulated CUDA kernels
in place of the CPU's, which its result is held to. --fault plants one of FAULTS in the emulator's
sources, which a test has to find.

FOLDER gets the weights of both runs, `cpu.pt` and `cuda.pt`, and the emulator's launches,
`emulated.jsonl`. The last line of output is JSON: `losses`, the metrics of each step by device, and
`operators`, how often each was computed and its largest error, 1 being the largest allowed.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost
from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.flags import read_flags
from m3i_fast.recipes import recipes
from tests.shared.cuda import emulator
from tests.shared.cuda.fault import Fault

NUM_STEPS = 5

FAULTS = {
    # The third channel is normalised by the second one's deviation.
    "number": Fault(
        source="mask_mix/sm80/kernels.cuh",
        before="active, params.scale[c], params.shift[c]",
        after="active, params.scale[c == 2 ? 1 : c], params.shift[c]",
        launcher="mask_mix",
        report="m3i::mask_mix, result 0",
    ),
    # A block has all pictures, where it had one: the same numbers.
    "grid": Fault(
        source="mask_mix/sm80/launch.cu",
        before="std::min<int64_t>(params.num_pictures, kMaxGridY)",
        after="std::min<int64_t>(params.num_pictures, 1)",
        launcher="mask_mix",
        report="launch 0",
    ),
}

# Error of a result over its largest number, by the dtype of the operator's first tensor or of the
# result: sums in another order, and in 16 bits what the kernels hand from one to the next.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
ROUNDING = 2e-7  # of numbers of about 1 in float32, whose mean may be 0


@dataclass
class Held:
    """An operator of m3i computed by its emulated CUDA kernels, and held to its CPU kernel."""

    name: str
    by_cuda: Any
    by_cpu: Any
    architecture: int
    margin: float = 1.0
    calls: int = 0
    error: float = 0.0

    def __call__(self, *args: Any) -> Any:
        """Return what the CUDA kernels compute; raise ValueError where the CPU's differ.

        Arguments that the operator writes to are results as well.
        """
        written = _written(self.by_cpu, args)
        copies = tuple(a.clone() if place in written else a for place, a in enumerate(args))
        if self.name == "boltzmann_rows_pass":
            expected: Any = _rows_pass_by_cpu(self.by_cpu, *copies)
        else:
            expected = self.by_cpu(*copies)
        with emulator.emulated_gpu(self.architecture):
            out = self.by_cuda(*args)
        self.calls += 1
        if not _means_nothing(self.by_cpu, args):
            ours = _results(self.name, out, args, written)
            cpus = _results(self.name, expected, copies, written)
            pairs = zip(ours, cpus, strict=True)
            for place, (ours, cpus) in enumerate(pairs):
                self._compare(place, ours, cpus, args[0].dtype)
        return out

    def _compare(self, place: int, ours: Tensor, expected: Tensor, of: torch.dtype) -> None:
        if not expected.numel():
            return
        tolerance = self.margin * max(TOLERANCE.get(dtype, 0) for dtype in (of, expected.dtype))
        numbers = expected.double().where(expected.isfinite(), 0.0)
        largest = numbers.abs().max().item()
        # A scalar is a sum over all pairs, of numbers of about 1 that may cancel.
        allowed = tolerance * max(largest, 1.0) if expected.dim() == 0 else tolerance * largest
        # Both may hold an infinity, such as the largest logit of a row without columns.
        differ = torch.where(ours == expected, 0.0, ours.double() - expected.double())
        error = differ.abs().max().item()
        self.error = max(self.error, error / (allowed + ROUNDING))
        if not error <= allowed + ROUNDING:  # also of a NaN
            raise ValueError(
                f"m3i::{self.name}, result {place} {list(expected.shape)} by CUDA's kernels: "
                f"expected the CPU's, up to {largest:.3e}, within {allowed:.1e}, got {error:.1e}"
            )


def _results(name: str, out: Any, args: tuple[Any, ...], written: list[int]) -> list[Tensor]:
    """What the operator returned and wrote, but the padding of a block of rows."""
    leaves = pytree.tree_leaves([out, *(args[place] for place in written)])
    results = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if name == "boltzmann_rows_pass":
        return [result[..., : args[2]] if result.dim() == 2 else result for result in results]
    return [_together(name, result) if place in PARTS.get(name, ()) else result
            for place, result in enumerate(results)]  # fmt: skip


# Results [parts, 4] that the next kernel puts together: each device has parts of its own.
PARTS = {"boltzmann_prepare": (3,), "boltzmann_totals": (0,)}


def _together(name: str, parts: Tensor) -> Tensor:  # [parts, 4] -> [4]
    """Add parts up; of boltzmann_prepare's extremes the first three are maxima."""
    if name == "boltzmann_totals":
        return parts.sum(0)
    return torch.cat([parts[:, :3].amax(0), parts[:, 3:].sum(0)])


def _written(operator: Any, args: tuple[Any, ...]) -> list[int]:
    """The places of tensors that the operator writes to."""
    arguments = enumerate(zip(operator._schema.arguments, args, strict=False))
    return [
        place
        for place, (argument, value) in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(value, Tensor)
    ]


def _rows_pass_by_cpu(operator: Any, *args: Any) -> None:
    """boltzmann_rows_pass, whose CPU kernel leaves its gradients in the products alone."""
    *before, rounded, writes_products = args
    if rounded is None:
        return operator(*args)
    wide = args[0].clone()
    operator(wide, *before[1:], None, True)
    rounded.copy_(wide)
    if writes_products:
        args[0].copy_(wide)
    return None


def _means_nothing(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether the operator's `run` (cuda/bindings.cpp) says that nothing is to be done."""
    named = dict(zip((a.name for a in operator._schema.arguments), args, strict=False))
    run = named.get("run")
    return run is not None and not run.item()


def held_operators(
    ops: list[str], folder: Path, architecture: int, margin: float = 1.0
) -> dict[Any, Held]:
    """Return the operators of these ops by overload; the ops' sources are in folder/OP.

    architecture: the emulated card's compute capability, times ten. Kernels are those that it would
    run of build/cuda: 9.0's own, or 8.0's, whose PTX later cards compile. margin: multiplies
    TOLERANCE.
    """
    held, compiled = {}, 90 if architecture == 90 else 80
    for op in ops:
        found = emulator.emulated_operators(op, folder=folder, architecture=compiled)
        for name, by_cuda in found.items():
            overload = getattr(torch.ops.m3i, name).default
            held[overload] = Held(name, by_cuda, overload, architecture, margin)
    return held


def plant(fault: Fault, ops: list[str], folder: Path) -> Path:
    """Copy the sources of these ops to folder/OP, plant the fault there, and return the folder."""
    for op in ops:
        shutil.copytree(emulator.CUDA / op, folder / op)
    fault.plant(folder / fault.source)
    return folder


def for_a_few_steps(cfg: TrainConfig) -> TrainConfig:
    """Return the recipe in its own sizes, for some steps, each with its metrics."""
    return replace(
        cfg,
        num_steps=NUM_STEPS,
        log_every=1,
        checkpoint_every=NUM_STEPS,
        num_classes=cfg.num_classes or 10,
    )


def train(cfg: TrainConfig, folder: Path) -> list[dict[str, float]]:
    """Train, write the weights to FOLDER/DEVICE.pt, and return the metrics of each step."""
    steps: list[dict[str, float]] = []
    batch = draw_batch(cfg).to(torch.device(cfg.device))
    trainer = Trainer(cfg, folder / f"run-{cfg.device}", data=Repeated(batch))
    trainer.train(lambda step, values: steps.append({"step": step, **values}))
    weights = {name: value.cpu() for name, value in trainer.objective.state_dict().items()}
    torch.save(weights, folder / f"{cfg.device}.pt")
    return steps


def main() -> None:
    """Run the recipe that the command line names."""
    folder, recipe, ops, *flags = sys.argv[1:]
    out, sources = Path(folder), emulator.CUDA
    if flags[:1] == ["--fault"]:
        sources = plant(FAULTS[flags[1]], ops.split(","), out / "cuda")
        flags = flags[2:]
    default = for_a_few_steps(recipes()[recipe]())
    cfg = read_flags(TrainConfig, flags, prog="emulated_run", default=default)
    losses = {"cpu": train(replace(cfg, device="cpu"), out)}
    torch.backends.cudnn.enabled = False  # as in benchmarks/launches/one_run.py
    major, minor = torch.cuda.get_device_capability()
    held = held_operators(ops.split(","), sources, 10 * major + minor)
    with emulator.logged_launches(out / "emulated.jsonl"), ComputeOnHost(held):
        losses["cuda"] = train(replace(cfg, device="cuda"), out)
    operators = {each.name: {"calls": each.calls, "error": each.error} for each in held.values()}
    sys.stdout.write(json.dumps({"losses": losses, "operators": operators}) + "\n")


if __name__ == "__main__":
    main()
