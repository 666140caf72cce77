"""One point of `bench node --sweep`: CONFIG SCHEDULE RESULT, in a process of its own."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from m3i_fast.benchmarks.core.timed_windows import Schedule
from m3i_fast.benchmarks.node.main import measure_node
from m3i_fast.config import TrainConfig
from m3i_fast.durable_files import write_atomically
from m3i_fast.engine.parallel.ranks import leave_world
from m3i_fast.engine.parallel.watchdog import end_at_once, in_a_world

# Of errors that are no torch.OutOfMemoryError: a CPU's allocator, cuBLAS's workspace, CUDA's own.
_NO_MEMORY = ("can't allocate memory", "cublas_status_alloc_failed", "out of memory")


def main() -> None:
    """Measure one point and write its outcome: measured, refused, or out of memory.

    An error of one rank ends it at once with exit code 1, so that the others are ended, too: they
    may wait for it.
    """
    config, schedule, result = sys.argv[1:]
    try:
        measured = measure_node(
            TrainConfig.load(Path(config)), Schedule(**json.loads(schedule)), make_data=False
        )
    except Exception as error:
        outcome = outcome_of(error)
        if outcome is not None:
            _write(result, **outcome)
        elif in_a_world():
            traceback.print_exc()
        if in_a_world():
            end_at_once(1)
        if outcome is None:
            raise
    else:
        if measured.is_main:
            _write(result, status="measured", figures=measured.figures)
        leave_world()


def outcome_of(error: Exception) -> dict[str, str] | None:
    """Return what is recorded of a point that ends in an error; None where it is none of its."""
    if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
        return {"status": "out of memory", "reason": str(error).splitlines()[0]}
    if isinstance(error, ValueError | FileNotFoundError | ImportError):
        return {"status": "refused", "reason": str(error)}
    return None


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error).lower() for words in _NO_MEMORY)


def _write(path: str, **outcome: Any) -> None:
    write_atomically(Path(path), json.dumps(outcome, allow_nan=False).encode())


if __name__ == "__main__":
    main()
