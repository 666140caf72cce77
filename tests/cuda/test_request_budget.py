"""No line of a kernel asks more of memory than before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cuda.request_budget import CASES, FILE, Case, Lines, changes, compiler, count
from tests.shared.cuda.emulator import CUDA

NAMES = [f"{case.op}: {case.name}" for case in CASES]


def budget_of(case: Case) -> dict[str, Lines]:
    """What requests.json beside the kernels holds."""
    stored = json.loads((CUDA / case.op / FILE).read_text())
    if stored["compiler"] != compiler():
        pytest.skip(f"counted with {stored['compiler']}, here is {compiler()}")
    budget: dict[str, Lines] = stored["cases"][case.name]
    return budget


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_lines_keep_their_budget(case: Case) -> None:
    """Sectors of global memory, wavefronts of shared memory, arrivals at barriers."""
    changed = changes(budget_of(case), count(case))
    assert not changed, (
        "lines that take more or less than their budget; where that is meant, write it anew by "
        "`python -m tests.cuda.request_budget` and say why in the commit:\n" + "\n".join(changed)
    )


@pytest.mark.parametrize(
    ("name", "source", "before", "after", "line"),
    [
        pytest.param(
            "mask_mix: 2 of 32 x 32, bf16",
            "sm80/kernels.cuh",
            "params.views + view * kMaskMixChannels * plane + pixel;",
            "params.views + view * kMaskMixChannels * plane + pixel * 8 % plane;",
            "global read: for (int c = 0; c < kMaskMixChannels; ++c) pixels[c] = load",
            id="strided",
        ),
        pytest.param(
            "dcnv3: 14 x 14, 2 groups of 16, fp32",
            "sm80/nine.cuh",
            "kPitch = kTrips * kLanes | 1;",
            "kPitch = (kTrips * kLanes + 31) / 32 * 32;",
            "shared read: const float by[4] = {weights.x, weights.y, weights.z, weights.w};",
            id="bank conflict",
        ),
        pytest.param(
            "dcnv3: 14 x 14, 2 groups of 16, fp32",
            "sm80/window.cuh",
            "red_add(to + x * step, from->at);",
            "red_add(to + x * step, from->at), red_add(to + x * step, from->at);",
            "x < width) red_add(to + x * step, from->at), red_add(to + x * step, from->at);",
            id="one atomic more",
        ),
    ],
)
def test_a_worse_line_is_named(
    tmp_path: Path, name: str, source: str, before: str, after: str, line: str
) -> None:
    """Also from a library that was built from a folder that is gone."""
    case = CASES[NAMES.index(name)]
    for folder in (tmp_path / "first", tmp_path / "second"):
        shutil.copytree(CUDA / case.op, folder / case.op)
        text = (folder / case.op / source).read_text()
        assert text.count(before) == 1
        (folder / case.op / source).write_text(text.replace(before, after))
        worse = changes(budget_of(case), count(case, folder))
        assert any(line in text for text in worse[:3]), worse
        shutil.rmtree(folder)
