"""Children of a process that is killed do not outlive it."""

import subprocess
import sys

import psutil


def test_a_child_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os, time; from m3i_fast.benchmarks.core.child_processes import child_processes; "
        "pool = child_processes(1); print(pool.submit(os.getpid).result(), flush=True); "
        "pool.submit(time.sleep, 3600).result()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        child = psutil.Process(int(main.stdout.readline()))
        main.kill()
    assert any(_has_ended(child) for _ in range(600))


def _has_ended(process: psutil.Process) -> bool:
    """Whether it has by now, or after a tenth of a second; nobody may have reaped it."""
    try:
        process.wait(0.1)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True
