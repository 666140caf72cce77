"""Instructions that kernels issue, a warp: cuda/<op>/instructions.json, beside the kernels.

`origin` says where the counts come from. A kernel has a count for each unit that its description
multiplies it with: `warp`, `point`, `step`, `tile`, `row`, `access`. Counts of a disassembler take
the place of those counted by hand under the same names.
"""

from __future__ import annotations

import json

from m3i_fast.ops.tiles import CUDA

FILE = "instructions.json"


def read_instructions(op: str) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the origin of an op's counts, and the counts by kernel and unit.

    Raises ValueError for a file that is missing or has something else.
    """
    path = CUDA / op / FILE
    where = f"cuda/{op}/{FILE}"
    if not path.is_file():
        raise ValueError(f"{where}: expected in a checkout with the kernels' sources, got none")
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.keys() != {"origin", "kernels"}:
        raise ValueError(f"{where}: expected an object with origin and kernels, got {content!r}")
    for kernel, counts in content["kernels"].items():
        for unit, count in counts.items():
            if type(count) not in (int, float) or not count > 0:
                raise ValueError(f"{where}: {kernel}.{unit}: expected a number > 0, got {count!r}")
    return content["origin"], content["kernels"]


def instructions_of(op: str, kernel: str) -> dict[str, float]:
    """Return a kernel's instructions by unit. Raises ValueError for a kernel without counts."""
    kernels = read_instructions(op)[1]
    if kernel not in kernels:
        raise ValueError(f"cuda/{op}/{FILE}: expected {kernel} in kernels, got {sorted(kernels)}")
    return kernels[kernel]
