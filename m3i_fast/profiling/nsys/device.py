"""What nsys recorded of a GPU: kernels, copies and the host's waits for it (CUPTI's tables)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from m3i_fast.profiling.nsys.tables import Tables
from m3i_fast.profiling.recording import Activity, HostRange, StageLookup, SyncCall

KERNELS = "CUPTI_ACTIVITY_KIND_KERNEL"
COPIES = {"CUPTI_ACTIVITY_KIND_MEMCPY": "Memcpy", "CUPTI_ACTIVITY_KIND_MEMSET": "Memset"}
CALLS = "CUPTI_ACTIVITY_KIND_RUNTIME"
WAITS = "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION"
STACKS = "CUDA_CALLCHAINS"
HOST_WAITS = {1: "cudaEventSynchronize", 3: "cudaStreamSynchronize", 4: "cudaDeviceSynchronize"}
"""CUPTI's kinds of synchronisation in which the host waits; in kind 2 a stream waits."""
DIRECTIONS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}


def has_device(tables: Tables) -> bool:
    """Return whether anything of a GPU was recorded."""
    return KERNELS in tables or CALLS in tables


def activities(
    tables: Tables, steps: Sequence[HostRange], stage_at: StageLookup
) -> tuple[Activity, ...]:
    """Return the kernels and copies that the steps launched, by their start."""
    launched = _launches(tables, steps)
    found = (*_kernels(tables, launched, stage_at), *_copies(tables, launched, stage_at))
    return tuple(sorted(found, key=lambda item: item.begin))


def _launches(tables: Tables, steps: Sequence[HostRange]) -> dict[int, int]:
    """Return when each call within the steps was made, by its correlation id."""
    tables.expect(CALLS, "cuda")
    begin, end = steps[0].begin, steps[-1].end
    rows = tables.rows(CALLS, "start", "correlationId")
    return {number: start for start, number in rows if begin <= start < end}


def _kernels(tables: Tables, launched: dict[int, int], stage_at: StageLookup) -> Iterator[Activity]:
    tables.expect(KERNELS, "cuda")
    columns = "start", "end", "streamId", "correlationId", "demangledName|shortName|name"
    for begin, end, stream, number, name in tables.rows(KERNELS, *columns):
        if number in launched:
            yield Activity(
                name=tables.text(name),
                begin=begin,
                end=end,
                self_ns=end - begin,
                stage=stage_at(launched[number]),
                stream=stream,
            )


def _copies(tables: Tables, launched: dict[int, int], stage_at: StageLookup) -> Iterator[Activity]:
    for table, kind in COPIES.items():
        if table not in tables:
            continue
        columns = "start", "end", "streamId", "correlationId", "bytes?", "copyKind?"
        for begin, end, stream, number, num_bytes, way in tables.rows(table, *columns):
            if number in launched:
                yield Activity(
                    name=f"{kind} {DIRECTIONS.get(way, '')}".strip(),
                    begin=begin,
                    end=end,
                    self_ns=end - begin,
                    stage=stage_at(launched[number]),
                    stream=stream,
                    num_bytes=float(num_bytes or 0),
                )


def waits(tables: Tables, steps: Sequence[HostRange], stage_at: StageLookup) -> Iterator[SyncCall]:
    """Yield the host's waits from CUPTI's table of them, else from API calls by name."""
    stacks = _stacks(tables)
    chains = {}
    calls: list[tuple[str, int, int, int]] = []
    columns = "start", "end", "correlationId", "nameId|name", "callchainId?"
    for start, end, number, name, chain in tables.rows(CALLS, *columns):
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
        if steps[0].begin <= start < steps[-1].end:
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
