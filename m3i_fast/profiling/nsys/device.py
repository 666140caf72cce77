"""What nsys recorded of a GPU: kernels, copies and the host's waits for it (CUPTI's tables)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3i_fast.profiling.nsys.host import thread_names
from m3i_fast.profiling.nsys.tables import Tables
from m3i_fast.profiling.recording import LOADER, Activity, HostRange, StageLookup, SyncCall

KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
COPIES = {"CUPTI_ACTIVITY_KIND_MEMCPY": "Memcpy", "CUPTI_ACTIVITY_KIND_MEMSET": "Memset"}
CALLS = "CUPTI_ACTIVITY_KIND_RUNTIME"
WAITS = "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION"
STACKS = "CUDA_CALLCHAINS"
HOST_WAITS = {1: "cudaEventSynchronize", 3: "cudaStreamSynchronize", 4: "cudaDeviceSynchronize"}
"""CUPTI's kinds of synchronisation in which the host waits; in kind 2 a stream waits."""
AUTOGRAD = "pt_autograd"
"""torch's name for the threads of backward passes, which launch what belongs to a step."""
DIRECTIONS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}


def has_device(tables: Tables) -> bool:
    """Return whether anything of a GPU was recorded."""
    return KERNELS in tables or CALLS in tables


def activities(
    tables: Tables, steps: Sequence[HostRange], stage_at: StageLookup
) -> tuple[Activity, ...]:
    """Return the kernels and copies that were launched during the steps, by their start."""
    stages = _launches(tables, steps, stage_at)
    found = (*_kernels(tables, stages), *_copies(tables, stages))
    return tuple(sorted(found, key=lambda item: item.begin))


def _launches(tables: Tables, steps: Sequence[HostRange], stage_at: StageLookup) -> dict[int, str]:
    """Return the stage of each call within the steps, by its correlation id."""
    tables.expect(CALLS, "cuda")
    begin, end = steps[0].begin, steps[-1].end
    rows = tables.rows(CALLS, "start", "correlationId", "globalTid?")
    loaders = _loader_threads(tables, steps)
    return {
        number: LOADER if thread in loaders else stage_at(start)
        for start, number, thread in rows
        if begin <= start < end
    }


def _loader_threads(tables: Tables, steps: Sequence[HostRange]) -> set[int]:
    """Return the threads that have a name, which is neither autograd's nor that of the steps'."""
    names = thread_names(tables)
    return {
        thread
        for thread, name in names.items()
        if thread != steps[0].thread and not name.startswith(AUTOGRAD)
    }


def _kernels(tables: Tables, stages: Mapping[int, str]) -> Iterator[Activity]:
    tables.expect(KERNELS, "cuda")
    columns = "start", "end", "streamId", "correlationId", "demangledName|shortName|name"
    for begin, end, stream, number, name in tables.rows(KERNELS, *columns):
        if number in stages:
            yield Activity(
                name=tables.text(name),
                begin=begin,
                end=end,
                self_ns=end - begin,
                stage=stages[number],
                stream=stream,
            )


def _copies(tables: Tables, stages: Mapping[int, str]) -> Iterator[Activity]:
    for table, kind in COPIES.items():
        if table not in tables:
            continue
        columns = "start", "end", "streamId", "correlationId", "bytes?", "copyKind?"
        for begin, end, stream, number, num_bytes, way in tables.rows(table, *columns):
            if number in stages:
                yield Activity(
                    name=f"{kind} {DIRECTIONS.get(way, '')}".strip(),
                    begin=begin,
                    end=end,
                    self_ns=end - begin,
                    stage=stages[number],
                    stream=stream,
                    num_bytes=float(num_bytes or 0),
                )


def waits(tables: Tables, steps: Sequence[HostRange], stage_at: StageLookup) -> Iterator[SyncCall]:
    """Yield the host's waits from CUPTI's table of them, else from API calls by name.

    Those of the loader's threads are left out: the steps do not wait with them.
    """
    stacks = _stacks(tables)
    chains = {}
    calls: list[tuple[str, int, int, int]] = []
    loaders, of_loader = _loader_threads(tables, steps), set()
    columns = "start", "end", "correlationId", "nameId|name", "callchainId?", "globalTid?"
    for start, end, number, name, chain, thread in tables.rows(CALLS, *columns):
        if thread in loaders:
            of_loader.add(number)
        chains[number] = chain
        calls.append((tables.text(name).partition("_v")[0], start, end, number))
    if WAITS in tables:
        found = [
            (HOST_WAITS[kind], start, end, number)
            for start, end, number, kind in tables.rows(
                WAITS, "start", "end", "correlationId", "syncType"
            )
            if kind in HOST_WAITS
        ]
    else:
        found = [call for call in calls if call[0].endswith("Synchronize")]
    for name, start, end, number in sorted(found, key=lambda wait: wait[1]):
        if number not in of_loader and steps[0].begin <= start < steps[-1].end:
            stack = stacks.get(chains.get(number), ())
            yield SyncCall(name=name, begin=start, end=end, stage=stage_at(start), stack=stack)


def _stacks(tables: Tables) -> dict[Any, tuple[str, ...]]:
    """Return the call stacks by their number, the innermost frame first."""
    if STACKS not in tables:
        return {}
    frames: dict[Any, list[tuple[int, str]]] = defaultdict(list)
    for number, symbol, depth in tables.rows(STACKS, "id", "symbol", "stackDepth"):
        frames[number].append((depth, tables.text(symbol)))
    return {number: tuple(s for _, s in sorted(stack)) for number, stack in frames.items()}
