"""Golden files: where they are, how they are written, and how two values differ.

Floats are stored as `float.hex` writes them. A tensor is an object with its dtype, shape, digest,
norm and the sum of its positive elements. On the machine that a file names all are equal; on
another one digests are left out, and floats are close.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORED = Path(__file__).parent / "stored"
# Of another machine. Each step multiplies what roundings differ by: BYOL's losses differ by 5e-5
# after four steps on an AMD EPYC. The mean of its cosines is near 0 in the first step.
RELATIVE, ABSOLUTE = 1e-4, 1e-6
LIBRARIES = ("torch", "numpy", "pillow", "nvidia-dali-cuda130")
_FLOAT = re.compile(r"-?0x[01]\.[0-9a-f]+p[+-]\d+|-?inf|nan")
_LINE = 160  # columns of a file
_SHOWN = 12  # differences of a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """What a part gives, and on what machine."""

    machine: dict[str, str]
    value: Any


def machine() -> dict[str, str]:
    """Return what bits of floats depend on: the kind of CPU, and the versions of libraries."""
    found = {"cpu": _cpu()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "none"
    return found


def _cpu() -> str:
    """Return vendor, family and model, as Linux has them. Clouds hide the model's name."""
    text = Path("/proc/cpuinfo").read_text()
    names = ("vendor_id", "cpu family", "model", "model name")
    found = [re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE) for name in names]
    return ", ".join(match[1] for match in found if match)


def of_tensor(tensor: Tensor) -> dict[str, Any]:
    """Return what is stored of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    content = tensor.view(torch.uint8) if tensor.dim() else tensor[None].view(torch.uint8)
    numbers = tensor.double()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(content.numpy().tobytes()).hexdigest()[:16],
        "norm": float(numbers.norm()).hex(),
        "positive": float(numbers.clamp(min=0).sum()).hex(),
    }


# ---- Files ---------------------------------------------------------------------------------------


def path_of(name: str) -> Path:
    """Return the golden file of a part."""
    return STORED / f"{name}.json"


def read(name: str) -> Golden:
    """Return the golden file of a part."""
    return Golden(**json.loads(path_of(name).read_text()))


def write(name: str, golden: Golden) -> bool:
    """Write the golden file of a part, and return whether that changed it."""
    path = path_of(name)
    before = path.read_text() if path.is_file() else ""
    text = _text(asdict(golden), "") + "\n"
    path.write_text(text)
    return text != before


def _text(value: Any, margin: str) -> str:
    """Return JSON for git: a line for each value, or for each object that fits into one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(margin) + len(line) <= _LINE:
        return line
    inner = margin + " "
    if isinstance(value, dict):
        members = [f"{json.dumps(k)}: {_text(v, inner)}" for k, v in value.items()]
    else:
        members = [_text(each, inner) for each in value]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(members) + f"\n{margin}{last}"


# ---- Comparing -----------------------------------------------------------------------------------


def assert_golden(name: str, got: Golden) -> None:
    """Hold that a part gives what its golden file says, to the bit on the machine that made it."""
    expected = read(name)
    is_same_machine = expected.machine == got.machine
    lines = list(differences(expected.value, got.value, exact=is_same_machine))
    if lines:
        shown = "\n".join(f"  {line}" for line in lines[:_SHOWN])
        more = f"\n  and {len(lines) - _SHOWN} more" * (len(lines) > _SHOWN)
        how = "equal bits" if is_same_machine else f"floats equal to {RELATIVE:g}"
        raise AssertionError(
            f"part {name} of the golden files has {len(lines)} differences ({how} expected):\n"
            f"{shown}{more}\nIf they are meant: python -m tests.golden.make {name}"
        )


def differences(expected: Any, got: Any, *, exact: bool, path: str = "") -> Iterator[str]:
    """Yield a line for each place at which two values for JSON differ.

    exact: compare bits of floats and digests of tensors too.
    """
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected)]:
            inner = f"{path} / {key}" if path else key
            if key not in got:
                yield f"{inner}: expected {_short(expected[key])}, got nothing"
            elif key not in expected:
                yield f"{inner}: expected nothing, got {_short(got[key])}"
            elif exact or key != "sha256":
                yield from differences(expected[key], got[key], exact=exact, path=inner)
    elif isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            yield f"{path}: expected {len(expected)} entries, got {len(got)}"
        for index, (one, other) in enumerate(zip(expected, got, strict=False)):
            yield from differences(one, other, exact=exact, path=f"{path} / {index}")
    elif expected != got and (exact or not _are_close(expected, got)):
        yield f"{path}: expected {_short(expected)}, got {_short(got)}"


def _are_close(expected: Any, got: Any) -> bool:
    both = (expected, got)
    if not all(isinstance(value, str) and _FLOAT.fullmatch(value) for value in both):
        return False
    first, second = map(float.fromhex, both)
    return math.isclose(first, second, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def _short(value: Any) -> str:
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        return f"{float.fromhex(value):.9g} ({value})"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:157]}..."
