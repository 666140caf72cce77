"""Transformer Engine's own modules train the demo on the null CUDA runtime, in bf16 and in FP8."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from m3i_fast.benchmarks.launches.trace import StepTrace, lines_of, read_trace, split_at_marks
from scripts.null_cuda import environment

ROOT = Path(__file__).resolve().parents[2]
# Attention by cuDNN's engines, and fusion by torch.compile, which the null runtime has not.
LEFT_OUT = {"NVTE_FUSED_ATTN": "0", "NVTE_TORCH_COMPILE": "0"}


def steady_step(folder: Path, *flags: str) -> StepTrace:
    """Train the demo for six steps on the null H100; return its fifth, when the allocator rests."""
    trace = folder / "trace.jsonl"
    variables = environment(ROOT / "build" / "null", trace=trace, root=ROOT)
    command = [sys.executable, "-m", "m3i_fast.benchmarks.launches.one_run", "demo"]
    command += ["--num-steps", "6", "--log-every", "6", "--checkpoint-every", "6"]
    done = subprocess.run(
        [*command, "--backend", "te", *flags],
        env=variables | LEFT_OUT, capture_output=True, text=True, timeout=900, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 6
    (step,) = (s for s in split_at_marks(read_trace(trace)) if s.name == "step 4")
    return step


@pytest.mark.parametrize(
    ("flags", "casts"),
    [
        ((), False),
        (("--precision", "fp8_current", "--fp8-min-dim", "128"), True),
        (("--precision", "fp8_delayed", "--fp8-min-dim", "128"), True),
    ],
)
def test_a_steady_step_neither_waits_nor_allocates(
    tmp_path: Path, flags: tuple[str, ...], casts: bool
) -> None:
    step = steady_step(tmp_path, *flags)
    assert not step.of("error") and not step.of("fault") and not step.of("unsupported")
    assert not lines_of(step.of("wait")) and not lines_of(step.of("allocate"))
    assert not [copy for copy in step.of("copy") if "pageable" in (copy["from"], copy["to"])]
    assert step.streams == {0}
    names = [launch["name"] for launch in step.of("launch")]
    # Norms, forward and backward: products are cuBLAS's, and views of both sizes share a call.
    assert sum("transformer_engine" in name for name in names) > 80
    assert any("fp8" in name.lower() for name in names) == casts
