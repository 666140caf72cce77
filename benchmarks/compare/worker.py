"""One version's process of `m3i-fast bench compare`: takes a sample whenever it is asked.

    python worker.py WORK --registry FILE [--site FOLDER] [--threads N] [--batch FILE --first N]

Started by its path, and the same file for both versions, as is --registry, op_registry.py of the
version that compares: of a version's package nothing is used but its public ops, so the work is the
same whatever its own benchmarks measure. With --batch WORK is a recipe, whose steps are taken as
the registry, step_work.py, says. --site: the folder of another version's package; without it the
installed one. Speaks JSON lines: says once what it loaded, or what is `missing` of the version and
ends; then answers {"calls": N, "extra": M, "warm": W} with {"ms": X}, the time of N + M calls over
N; where W is true, one call before them is not timed. The calls of `extra` are done, not added up:
they plant a slowdown.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

WARM_UP_S = 0.3


def works(registry: str) -> dict[str, Callable[[], Callable[[], object]]]:
    """Return what prepares a call of each op, by its name, from the registry's file."""
    return {op.name: op.work for op in runpy.run_path(registry)["OPS"]}


def use_package_of(site: str) -> None:
    """Put another version's package before the installed one, also before an editable one."""
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if "m3i_fast" not in getattr(finder, "known_source_files", ())
    ]
    sys.path.insert(0, site)


def sample_ms(call: Callable[[], object], calls: int, extra: int, *, warm: bool = True) -> float:
    """Return milliseconds a call; warm: one call before them is not timed."""
    if warm:
        call()
    begun = time.perf_counter()
    for _ in range(calls + extra):
        call()
    return (time.perf_counter() - begun) * 1e3 / calls


def prepare_op(registry: str, name: str) -> tuple[Callable[[], object], dict[str, Any]]:
    """Return a call of an op, warm, and the milliseconds that it takes."""
    call = works(registry)[name]()
    calls, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < WARM_UP_S or not calls:
        call()
        calls += 1
    return call, {"ms": elapsed * 1e3 / calls}


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("--registry", required=True)
    parser.add_argument("--site")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch")
    parser.add_argument("--first", type=int, default=1)
    arguments = parser.parse_args()
    del sys.path[0]  # this file's folder, whose names are not the package's
    if arguments.site:
        use_package_of(arguments.site)
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.batch:
        step_work = runpy.run_path(arguments.registry)
        try:
            call, said = step_work["prepare"](arguments.work, arguments.batch, arguments.first)
        except step_work["MissingError"] as error:
            say({"missing": str(error)})
            return
    else:
        call, said = prepare_op(arguments.registry, arguments.work)
    import m3i_fast.ops

    say({"ops": m3i_fast.ops.__file__, **said})
    for line in sys.stdin:
        asked = json.loads(line)
        milliseconds = sample_ms(call, asked["calls"], asked["extra"], warm=asked["warm"])
        say({"ms": milliseconds})


if __name__ == "__main__":
    main()
