"""Compare calls of every op with its reference in float64, each op in a process of its own.

    python first_kernels.py cuda|cpu [--launch-only]

Prints `check ` and JSON for each call, as scripts/gpu/reading.py reads it. On a GPU the kernels of
a training step (scripts/gpu/expected.json) must be among those whose results were compared.
--launch-only: a call that returns is enough, whatever it computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT_S = 120.0
EXPECTED = Path(__file__).resolve().parents[1] / "expected.json"
CALL, LAUNCH_ONLY = "--call", "--launch-only"


def run_calls(op_name: str, device: str, *, launch_only: bool) -> None:
    """Run the calls of an op; prints a line of JSON for each."""
    import torch

    from m3i_fast import op_registry
    from m3i_fast.backward_threads import release_last_backward
    from m3i_fast.benchmarks.launches.trace import launched, our_kernel

    (op,) = (op for op in op_registry.OPS if op.name == op_name)
    on_gpu = device == "cuda"
    for call in op.calls(on_gpu):
        names = launched(lambda call=call: call.results(device)) if on_gpu else []
        row = {
            "what": call.what,
            "error": None if launch_only else call.error(device),
            "kernels": sorted({kernel for name in names if (kernel := our_kernel(name))}),
            "capability": torch.cuda.get_device_capability() if on_gpu else None,
        }
        print(json.dumps(row), flush=True)
    release_last_backward()


def answers(op_name: str, device: str, options: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Return what a child process found of each call, and why it ended before the last one."""
    command = [sys.executable, __file__, CALL, op_name, device, *options]
    with tempfile.TemporaryDirectory() as folder:
        trace = {"NULL_CUDA_TRACE": f"{folder}/trace.jsonl"}
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **trace},
        )
        try:
            output, errors = child.communicate(timeout=LIMIT_S)
            status = f"exit status {child.returncode}" if child.returncode else ""
        except subprocess.TimeoutExpired:
            child.kill()
            output, errors = child.communicate()
            status, errors = f"no answer in {LIMIT_S:.0f} s", ""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return rows, status and (errors.strip().splitlines() or [status])[-1]


def tell(what: str, expected: str, got: str, holds: bool | None, source: str) -> bool:
    """Print a check; returns whether it is wrong."""
    check = {"what": what, "expected": expected, "got": got, "holds": holds, "source": source}
    print(f"check {json.dumps(check)}", flush=True)
    return holds is False


def tell_compared(capability: str, compared: set[str]) -> bool:
    """Tell which kernels of a step were in no call; returns whether there are any."""
    expected = json.loads(EXPECTED.read_text()).get(capability)
    what, source = "kernels of a bf16 step that a call has", "scripts/gpu/expected.json"
    if expected is None:
        return tell(what, f"no list for {capability}", ", ".join(sorted(compared)), None, source)
    left = sorted(expected["kernels"].keys() - compared)
    got = f"all but {', '.join(left)}" if left else f"all {len(expected['kernels'])}"
    return tell(what, f"all {len(expected['kernels'])}", got, not left, source)


def main() -> None:
    """Print the checks; exits with 1 where one is not as expected."""
    if sys.argv[1] == CALL:
        run_calls(*sys.argv[2:4], launch_only=LAUNCH_ONLY in sys.argv)
        return
    from m3i_fast.op_registry import OPS

    device, *options = sys.argv[1:]
    launch_only, failed = LAUNCH_ONLY in options, False
    compared, capability = set[str](), "of this card"
    for op in OPS:
        rows, why = answers(op.name, device, options)
        for row in rows:
            compared |= set(row["kernels"])
            if row["capability"]:
                capability = "{}.{}".format(*row["capability"])
            expected, got, holds = "launched", "launched; its results were not looked at", True
            if not launch_only:
                expected = "an error of 1 at most, of what the dtype allows beside float64"
                got, holds = f"{row['error']:.2g}", row["error"] <= 1
            source = "m3i_fast/op_registry.py, calls"
            failed |= tell(f"{op.title} on {device}: {row['what']}", expected, got, holds, source)
        if why:
            what = f"{op.title} on {device}, after {len(rows)} calls"
            failed |= tell(what, "no error", why, False, "m3i_fast/op_registry.py, calls")
    if device == "cuda":
        failed |= tell_compared(capability, compared)
    sys.exit(failed)


if __name__ == "__main__":
    main()
