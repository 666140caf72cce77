"""What can be measured, by the name that `m3i-fast bench` knows it by."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from m3i_fast.op_registry import OPS

# name -> the module whose `main` takes the arguments, and what it measures
SUBJECTS = {
    **{op.name: (op.module, op.measures) for op in OPS},
    "internimage": (
        "ops.internimage",
        "a whole InternImage with our dcnv3 beside one with a grid_sample core",
    ),
    "muon": (
        "training.muon",
        "a step of Muon: ours beside torch's, also on a CPU without bf16 units",
    ),
    "step": (
        "training.step",
        "a training step of M3I: ours beside one written plainly in eager torch",
    ),
    "packed": (
        "training.packed",
        "pictures of any size and aspect through a ViT: packed beside padded and bucketed",
    ),
    "scaling": (
        "scaling.main",
        "images/s and efficiency over ranks of this machine, and a prediction beyond it",
    ),
    "launches": (
        "launches.main",
        "launches, copies, waits and memory of each recipe's step, without a GPU",
    ),
    "sass": (
        "sass.main",
        "the machine code of the CUDA kernels: pipes, widths, loops, and what changed; no GPU",
    ),
    "loader": (
        "loader.main",
        "our loader beside torchvision and webdataset, and beside decoding alone",
    ),
    "packed_loader": (
        "loader.packed",
        "our loader of views of any size beside that of squares, in one run",
    ),
    "checkpoint": (
        "training.checkpoint",
        "how long a checkpoint keeps a step waiting, at once and in the background",
    ),
    "demo": ("ledger.demo_table", "the demo over several seeds, from the ledger's rows"),
    "node": (
        "node.main",
        "images a second of a node: loader, training, both, what bounds them, and a sweep",
    ),
    "page": (
        "ledger.page",
        "the ledger as a page, as tables of README and docs, or for other tools",
    ),
    "compare": (
        "compare.main",
        "this version beside another: the ledger's rows, or both measured in turns",
    ),
    "tune": (
        "tune.main",
        "tiles of dcnv3 and boltzmann: compiled, pruned by a model, timed where a card is",
    ),
    "roofline": (
        "roofline.main",
        "kernels predicted from bytes, sectors, wavefronts, issue slots; beside published times",
    ),
    "methods": (
        "methods.main",
        "methods with one budget, M3I's ablations, few annotations, a pilot and its power",
    ),
    "one-stage": (
        "one_stage.main",
        "one stage of M3I beside single targets and two stages, by a plan fixed before it runs",
    ),
    "telemetry": (
        "training.telemetry",
        "what logging and telemetry cost a step: processor time, and A B A B",
    ),
}


def load(name: str) -> Callable[[list[str] | None], int | None]:
    """Import a subject's module and return its `main`; KeyError for an unknown name."""
    module = importlib.import_module(f"m3i_fast.benchmarks.{SUBJECTS[name][0]}")
    main: Callable[[list[str] | None], int | None] = module.main
    return main
