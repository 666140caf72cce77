"""Call every op once on a device, each in a process of its own, and tell which results are right.

    python first_kernels.py cuda|cpu [--launch-only]

Prints `check ` and JSON for each, as scripts/gpu/reading.py reads it. --launch-only: a call that
returns is enough, whatever it computed.
"""

from __future__ import annotations

import json
import subprocess
import sys

LIMIT_S = 120.0
CALL = """
import os
import sys
from m3i_fast import op_registry
(op,) = (op for op in op_registry.OPS if op.name == sys.argv[1])
print("right" if op.is_right(sys.argv[2]) else "wrong")
if sys.argv[2] == "cuda":
    import torch
    torch.cuda.synchronize()
sys.stdout.flush()
os._exit(0)  # an autograd thread that still frees what Python holds would abort while it finalises
"""


def answer(op: str, device: str) -> str:
    """Return `right`, `wrong`, or the last line of the error of a call in a child process."""
    command = [sys.executable, "-c", CALL, op, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {LIMIT_S:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return done.stdout.split()[-1]


def main() -> None:
    """Print a check for each op; exits with 1 where one is not as expected."""
    from m3i_fast.op_registry import OPS

    device, launch_only = sys.argv[1], "--launch-only" in sys.argv
    failed = False
    for op in OPS:
        got = answer(op.name, device)
        holds = got == "right"
        expected = "right, as on the CPU"
        if launch_only:
            expected, holds = "launched", got in ("right", "wrong")
            got = "launched; what it computed was not looked at" if holds else got
        failed |= not holds
        check = {"what": f"{op.title} on {device}", "expected": expected, "got": got}
        source = {"source": "m3i_fast/op_registry.py, is_right", "holds": holds}
        print(f"check {json.dumps(check | source)}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
