"""A program with known stages for nsys to record.

Arguments: a file for what its own timer measured, as JSON; milliseconds that stage `comm` sleeps;
how many processes do the same, each with a file of its own.

In each of three steps `bwd` computes, a thread named "sleeper" is waited for in `data.wait`, and
`comm` sleeps. Before and after what is captured it takes a step that must not be found.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import torch

from m3i_fast.observe.nvtx import NvtxRange
from m3i_fast.observe.stages import StageTimer
from m3i_fast.profiling.capture import CAPTURE
from m3i_fast.profiling.recording import STEP

LOADER_MS, COMPUTE_MS, STEPS = 60, 100, 3
PR_SET_NAME = 15


def _set_name(name: bytes) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)


def _sleep(awake: Event) -> None:
    time.sleep(LOADER_MS / 1000)
    awake.set()


def _compute(milliseconds: float) -> None:
    ends = time.perf_counter() + milliseconds / 1000
    while time.perf_counter() < ends:
        pass


def _step(timer: StageTimer, sleep_ms: float) -> None:
    with timer.mark(STEP):
        with timer.stage("data.wait"):
            awake = Event()
            sleeper = Thread(target=_sleep, args=(awake,))
            _set_name(b"sleeper")  # inherited, so that nsys cannot read the name before it is set
            sleeper.start()
            _set_name(b"python")
            awake.wait()
            sleeper.join()
        with timer.stage("bwd"):
            _compute(COMPUTE_MS)
            with timer.stage("comm"):
                time.sleep(sleep_ms / 1000)
            _compute(COMPUTE_MS)
        with timer.stage("log"):
            pass


def main() -> None:
    path, sleep_ms, num = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    others = [
        subprocess.Popen([sys.executable, __file__, f"{path}.{number}", sys.argv[2], "1"])
        for number in range(1, num)
    ]
    timer = StageTimer(torch.device("cpu"))
    _step(timer, sleep_ms)
    before = timer.totals()
    with NvtxRange(CAPTURE):
        for _ in range(STEPS):
            _step(timer, sleep_ms)
    after = timer.totals()
    _step(timer, sleep_ms)
    assert not any(other.wait() for other in others)
    own = {name: 1000 * (after[name] - before[name]) / STEPS for name in after}
    path.write_text(json.dumps(own))


if __name__ == "__main__":
    main()
