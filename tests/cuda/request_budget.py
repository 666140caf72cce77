"""The requests of memory that each op's kernels may make, beside their registers and spills.

`python -m tests.cuda.request_budget` counts and writes cuda/<op>/requests.json anew; the test
beside it holds them. Counted by the emulator are small calls whose inputs need no random numbers:
sectors of 32 bytes in global memory, wavefronts in shared memory, arrivals at barriers, of each
line.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from m3i_fast import ops
from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.views import draw_views, make_patches, make_views, view_specs
from tests.shared.cuda.emulator import CUDA, emulated
from tests.shared.cuda.requests import counted_requests, read_requests

FILE = "requests.json"
Lines = dict[str, int]
"""Units by "memory access: text of the line"."""
Budget = dict[str, dict[str, Lines]]
"""By case and kernel."""


def waves(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Values in [-scale, scale] that look like nothing in particular, the same everywhere."""
    count = torch.Size(shape).numel()
    return (scale * (torch.arange(count, dtype=torch.float64) * 0.7).sin()).to(dtype).view(shape)


# ---- Cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A call of an op."""

    op: str
    name: str
    call: Callable[[], object]
    architecture: int = 80


def _dcnv3(dtype: torch.dtype) -> None:
    x = waves(1, 14, 14, 32, dtype=dtype).requires_grad_()
    offset = waves(1, 14, 14, 2 * 9 * 2, dtype=dtype, scale=1.5).requires_grad_()
    mask = waves(1, 14, 14, 2 * 9, dtype=dtype).requires_grad_()
    geometry = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
    out = ops.dcnv3(x, offset, mask, groups=2, **geometry)
    out.backward(waves(*out.shape, dtype=dtype))


def _mask_mix(dtype: torch.dtype) -> None:
    views = (waves(4, 3, 32, 32, scale=127) + 128).to(torch.uint8)
    choice = (torch.arange(2 * 4 * 4) % 2).to(torch.uint8).view(2, 4, 4)
    ops.mask_mix(views, choice, torch.arange(4).view(2, 2), dtype=dtype)


def _gaussian(dtype: torch.dtype) -> None:
    z_hat = waves(64, 96, dtype=dtype).requires_grad_()
    ops.gaussian(z_hat, waves(64, 96, dtype=dtype, scale=2.0), normalise=True).backward()


def _add_layer_norm(dtype: torch.dtype) -> None:
    x, branch = waves(64, 96).requires_grad_(), waves(64, 96, dtype=dtype, scale=2.0)
    weight, bias = (waves(96, scale=s).requires_grad_() for s in (1.0, 0.5))
    results = ops.add_layer_norm(x, branch.requires_grad_(), weight, bias, dtype=dtype)
    torch.autograd.backward(results, [waves(64, 96, dtype=t.dtype) for t in results])


def _boltzmann(dtype: torch.dtype, count: int) -> None:
    features = [waves(count, 64, dtype=dtype, scale=s).requires_grad_() for s in (0.1, 0.2)]
    ops.boltzmann(*features, torch.tensor(8.0, requires_grad=True)).backward()


def _boltzmann_rows(soft: bool) -> None:
    z_hat, z = (waves(count, 64, scale=0.2) for count in (32, 130))
    targets = ops.SoftTargets(z_hat.clone(), z, torch.tensor(20.0)) if soft else torch.arange(32)
    value = ops.boltzmann(z_hat.requires_grad_(), z, torch.tensor(8.0), targets=targets)
    # Of a graph that is not kept a CPU's backward pass overwrites what it saved, without a kernel.
    value.backward(retain_graph=True)


def _views(grids: Tensor | None = None) -> None:
    specs = view_specs(ViewConfig(count=2, size=32, hue=0.1, blur_probability=1.0))
    size = torch.tensor([[[60, 80]], [[64, 48]]])
    pixels = (waves(60 * 80 * 3 + 64 * 48 * 3, scale=127) + 128).to(torch.uint8)
    params = draw_views(size, torch.arange(2), seed=7, views=specs)
    offset = torch.tensor([[0], [60 * 80 * 3]])
    if grids is None:
        make_views(pixels, offset, size, params, views=specs)
    else:
        make_patches(pixels, offset, size, params, grids, views=specs, patch_size=4)


CASES = (
    Case("dcnv3", "14 x 14, 2 groups of 16, fp32", lambda: _dcnv3(torch.float32)),
    Case("dcnv3", "14 x 14, 2 groups of 16, bf16", lambda: _dcnv3(torch.bfloat16)),
    Case("mask_mix", "2 of 32 x 32, bf16", lambda: _mask_mix(torch.bfloat16)),
    Case("gaussian", "64 x 96, bf16", lambda: _gaussian(torch.bfloat16)),
    Case("add_layer_norm", "64 x 96, bf16", lambda: _add_layer_norm(torch.bfloat16)),
    Case("boltzmann", "128 x 128 of 64, bf16", lambda: _boltzmann(torch.bfloat16, 128)),
    Case("boltzmann", "256 x 256 of 64, bf16, sm_90", lambda: _boltzmann(torch.bfloat16, 256), 90),
    Case("boltzmann", "32 x 130 of 64, classes, fp32", lambda: _boltzmann_rows(False)),
    Case("boltzmann", "32 x 130 of 64, soft targets, fp32", lambda: _boltzmann_rows(True)),
    Case("views", "2 x 2 of 32, blurred", _views),
    Case(
        "views",
        "2 x 2 of 32 x 32 in patches of 4, blurred",
        lambda: _views(torch.full((2, 2, 2), 8)),
    ),
)


# ---- Counting ------------------------------------------------------------------------------------


def count(case: Case, folder: Path = CUDA) -> dict[str, Lines]:
    """Run a case under the emulator; returns units by kernel and line. folder: of the op's."""
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "requests.jsonl"
        with (
            emulated(case.op, folder=folder, architecture=case.architecture),
            counted_requests(file),
        ):
            case.call()
        rows = read_requests(file, copies=folder)
    found: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        kind = row.memory if row.memory == "barrier" else f"{row.memory} {row.access}"
        kernel = re.sub(r"m3i::(\w+::)?", "", row.kernel)
        found[kernel][f"{kind}: {row.source}"] += row.units
    return {kernel: dict(sorted(lines.items())) for kernel, lines in sorted(found.items())}


def changes(budget: dict[str, Lines], found: dict[str, Lines]) -> list[str]:
    """Return the lines that take more or less than before, those that take most more first."""
    changed = []
    for kernel in {*budget, *found}:
        before, now = budget.get(kernel, {}), found.get(kernel, {})
        for line in {*before, *now}:
            less, more = before.get(line, 0), now.get(line, 0)
            if less != more:
                changed.append((less - more, f"{kernel}: {line}: {less:,} -> {more:,}"))
    return [text for _, text in sorted(changed)]


def compiler() -> str:
    """Return the compiler whose code is counted: another one may leave out other accesses."""
    said = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True)
    return f"g++ {said.stdout.strip().partition('.')[0]}"


def write(op: str) -> None:
    """Write an op's budget from what its cases take now."""
    budget = {case.name: count(case) for case in CASES if case.op == op}
    content = json.dumps({"compiler": compiler(), "cases": budget}, indent=1)
    (CUDA / op / FILE).write_text(content + "\n")


if __name__ == "__main__":
    for op in dict.fromkeys(case.op for case in CASES):
        write(op)
