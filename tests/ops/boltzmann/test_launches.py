"""How many kernels a call of boltzmann launches on a GPU: by the emulator's log of launches.

Tensors of the CPU stand for those of a GPU. Our ops launch their CUDA kernels under the emulator,
which logs them; every operator of torch that computes is one more launch there. The null CUDA
runtime counts the same under torch with CUDA, and beside it a memset for ids.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.ops import boltzmann
from m3i_fast.ops.boltzmann_exchange import SingleProcess
from tests.ops.boltzmann.cases import FP32, HALVES, Case, make
from tests.shared.cuda.emulator import emulated, logged_launches

# Kernels that work on tiles of logits, and what puts together the tiles' sums.
OF_TILES = re.compile(r"boltzmann_(maxima|sums|logit_grads|feature_grads|reduce|total)_")

# Operators of torch that launch nothing on a GPU.
SILENT = {
    torch.ops.aten.detach.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.expand.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.select.int,
}

BEFORE = ["prepare", "shift"]
BETWEEN = ["exact", "exact_shift"]
AFTER = ["totals", "loss"]
"""What the forward of the softmax launches beside its tiles."""

SOFTMAX = {"forward": [*BEFORE, *BETWEEN, *AFTER], "backward": ["scale"]}
# Over columns alone: a block of rows is one kernel, and beside it three GEMMs of torch.
ROWS = ["rows", "aten.ge.Scalar", "aten.clamp_min.default", "aten._to_copy.default"]
ROWS += [*["aten.sum.default"] * 3, "aten.reciprocal.default", "aten.mul.Tensor"]
CLASSES = {
    "forward": [*ROWS, "aten.clamp.default", "aten._to_copy.default"],
    "backward": ["scale"],
}
EXPECTED: dict[str, dict[str, list[str]]] = {
    "diagonal": SOFTMAX,
    "rows alone": {"forward": [*ROWS, "aten.arange.default"], "backward": ["scale"]},
    "classes": CLASSES,
    "classes with bias": CLASSES,
    "ids": {"forward": ["insert", *SOFTMAX["forward"]], "backward": ["scale"]},
    # the bias is one for all columns: its gradient is a sum by torch
    "sigmoid": {
        "forward": [*BEFORE, "aten.sum.default", "sigmoid_loss", "scale"],
        "backward": ["scale"],
    },
}


class Operators(TorchDispatchMode):
    """Counts operators of torch that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "m3i" and func not in SILENT:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def small_launches(log: Path, operators: Operators) -> Counter[str]:
    """Launches since the last call, without those of tiles; kernels by what `m3i` calls them."""
    kernels = [json.loads(line)["name"] for line in log.read_text().splitlines()]
    log.write_text("")
    ours = (re.search(r"boltzmann_(\w+)_kernel", name) for name in kernels
            if not OF_TILES.search(name))  # fmt: skip
    found = Counter(match[1] for match in ours if match) + operators.counts
    operators.counts = Counter()
    return found


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [HALVES[0], FP32])
@pytest.mark.parametrize("kind", EXPECTED)
def test_a_call_launches_at_most_twelve_small_kernels(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    call = make(Case(kind, 33, 33, 8))
    tensors = {
        name: tensor.to(dtype if name in ("z_hat", "z") else FP32).requires_grad_()
        for name, tensor in call.tensors.items()
    }
    grad_out, log, operators = torch.tensor(2.0), tmp_path / "launches.jsonl", Operators()
    with (
        emulated("boltzmann"),
        logged_launches(log),
        patch.object(SingleProcess, "is_settled", lambda *_: False),  # as on a GPU
        patch("torch.compiler.is_compiling", lambda: True),  # no warning, which the host reads
        operators,
    ):
        features = tensors["z_hat"], tensors["z"], tensors["scale"]
        bias = {"bias": tensors["bias"]} if "bias" in tensors else {}
        value = boltzmann(*features, **bias, **call.options)
        forward = small_launches(log, operators)
        torch.autograd.grad(value, list(tensors.values()), grad_out)
        backward = small_launches(log, operators)
    # Gradients of wide features that are made in the backward are scaled in place, without a copy.
    is_kept = "rows" in EXPECTED[kind]["forward"]
    in_place = Counter({"aten.mul_.Tensor": 2} if dtype == FP32 and not is_kept else {})
    expected = {name: Counter(names) for name, names in EXPECTED[kind].items()}
    expected["forward" if kind == "sigmoid" else "backward"] += in_place
    assert forward == expected["forward"]
    assert backward == expected["backward"]
    assert forward.total() + backward.total() + (kind == "ids") <= 12
