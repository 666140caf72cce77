"""m3i-fast bench NAME: run one benchmark of m3i_fast.benchmarks."""

from __future__ import annotations

import importlib

from m3i_fast.cli import console, refuse
from m3i_fast.hints import nearest

BENCHMARKS = {
    "mask_mix": "mask, mix and normalise views: ours beside the torch expressions it replaces",
    "dcnv3": "deformable convolution v3: ours beside grid_sample and torchvision",
    "gaussian": "the Gaussian likelihood: ours beside torch's layer_norm and mse_loss",
    "internimage": "a whole InternImage with our dcnv3 beside one with a grid_sample core",
    "mi_loss": "the Boltzmann likelihood beside ClipLoss, SigLipLoss and F.cross_entropy",
    "muon": "a step of Muon: ours beside torch's, also on a CPU without bf16 units",
    "step": "a training step of M3I: ours beside one written plainly in eager torch",
    "scaling": "images/s and efficiency over ranks of this machine, and a prediction beyond it",
    "loader": "our loader beside torchvision and webdataset, and beside decoding alone",
    "checkpoint": "how long a checkpoint keeps a step waiting, at once and in the background",
    "demo": "the demo over several seeds, from the ledger's rows",
    "cpu_shares": "how torch and the loader best share the cores of a CPU",
    "node": "images a second of a node: loader, training, both, what bounds them, and a sweep",
    "page": "the ledger as a page, as tables of README and docs, or for other tools",
    "compare": "this version beside another: the ledger's rows, or both measured in turns",
    "tune": "tiles of dcnv3 and mi_loss: compiled, pruned by a model, timed where a card is",
    "methods": "methods with one budget, M3I's ablations, few annotations, a pilot and its power",
    "telemetry": "what logging and telemetry cost a step: processor time, and A B A B",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        console.print("usage: m3i-fast bench NAME ...   (NAME --help tells more)\n")
        for name, description in BENCHMARKS.items():
            console.print(f"  {name:<16}{description}", highlight=False)
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        return refuse(
            f"unknown benchmark {name!r}: expected one of {known}." + nearest(name, BENCHMARKS)
        )
    return importlib.import_module(f"m3i_fast.benchmarks.{name}").main(rest) or 0
