"""Exports of nsys with a known answer, in an older and a newer schema; times are microseconds.

Two steps of 1000 us, alike. From the beginning of a step:
  host    fwd.input 0-300, loss.caption 300-500 with fwd.text 350-450 in it, bwd 500-900
  stream 7  a copy 20-60 (launched in fwd.input), a product 100-400 (fwd.input),
            an elementwise kernel 400-500 (fwd.text), a product 700-900 (bwd)
  stream 9  NCCL 650-850 (bwd)
  the host waits for a stream 920-940
Beside them what must not count: work from before the steps, another thread's range of the same
name, a range that is no stage, a range that is never closed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

Schema = Literal["old", "new"]

GEMM = "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_128x64>(Params)"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor<float>>(int)"
NCCL = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096>)"
STEP_NS = 1_000_000

_COLUMNS: Mapping[Schema, Mapping[str, str]] = {
    "old": {
        "StringIds": "id, value",
        "NVTX_EVENTS": "start, end, eventType, text, globalTid",
        "CUPTI_ACTIVITY_KIND_KERNEL": "start, end, streamId, correlationId, shortName",
        "CUPTI_ACTIVITY_KIND_MEMCPY": "start, end, streamId, correlationId, bytes, copyKind",
        "CUPTI_ACTIVITY_KIND_RUNTIME": "start, end, globalTid, correlationId, nameId",
    },
    "new": {
        "StringIds": "id, value",
        "NVTX_EVENTS": "start, end, eventType, text, globalTid, textId, domainId",
        "CUPTI_ACTIVITY_KIND_KERNEL": "start, end, deviceId, streamId, correlationId, "
        "demangledName, shortName, mangledName",
        "CUPTI_ACTIVITY_KIND_MEMCPY": "start, end, streamId, correlationId, bytes, copyKind",
        "CUPTI_ACTIVITY_KIND_RUNTIME": "start, end, globalTid, correlationId, nameId, callchainId",
        "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": "start, end, correlationId, syncType",
        "CUDA_CALLCHAINS": "id, symbol, stackDepth",
        "DIAGNOSTIC_EVENT": "timestamp, severity, text",
    },
}


def write_export(path: Path, schema: Schema, *, slow: int = 0) -> Path:
    """`slow`: microseconds that the elementwise kernel takes longer, in the idle time after it."""
    with closing(sqlite3.connect(path)) as database:
        file = _File(database, schema)
        file.kernel(-500, -400, ADD, launched=-510, stream=7)
        for begin in (0, 1000):
            _step(file, begin, slow)
        file.range(0, None, "bwd", thread=1)
        file.range(0, 2000, "bwd", thread=2)
        file.range(0, 2000, "ncclAllReduce", thread=1)
        if schema == "new":
            file.diagnose(1, "a word of information")
            file.diagnose(2, "some events were dropped")
        database.commit()
    return path


def _step(file: _File, at: int, slow: int) -> None:
    file.range(at, at + 1000, "step")
    file.range(at, at + 300, "fwd.input")
    file.range(at + 300, at + 500, "loss.caption")
    file.range(at + 350, at + 450, "fwd.text")
    file.range(at + 500, at + 900, "bwd")
    file.copy(at + 20, at + 60, launched=at + 5, stream=7, num_bytes=4096)
    file.kernel(at + 100, at + 400, GEMM, launched=at + 10, stream=7)
    file.kernel(at + 400, at + 500 + slow, ADD, launched=at + 360, stream=7)
    file.kernel(at + 650, at + 850, NCCL, launched=at + 600, stream=9)
    file.kernel(at + 700, at + 900, GEMM, launched=at + 610, stream=7)
    file.wait(at + 920, at + 940)


class _File:
    def __init__(self, database: sqlite3.Connection, schema: Schema) -> None:
        self._database, self._schema = database, schema
        self._strings: dict[str, int] = {}
        self._correlation = 0
        for table, columns in _COLUMNS[schema].items():
            database.execute(f"CREATE TABLE {table} ({columns})")

    def _insert(self, table: str, **values: Any) -> None:
        known = _COLUMNS[self._schema][table].split(", ")
        kept = {name: value for name, value in values.items() if name in known}
        places = ", ".join("?" * len(kept))
        self._database.execute(
            f"INSERT INTO {table} ({', '.join(kept)}) VALUES ({places})", list(kept.values())
        )

    def _string(self, text: str) -> int:
        if text not in self._strings:
            self._strings[text] = len(self._strings) + 1
            self._insert("StringIds", id=self._strings[text], value=text)
        return self._strings[text]

    def range(self, begin: int, end: int | None, name: str, *, thread: int = 1) -> None:
        is_new = self._schema == "new"
        never = None if is_new else 0
        self._insert(
            "NVTX_EVENTS",
            start=1000 * begin,
            end=never if end is None else 1000 * end,
            eventType=59,
            text=None if is_new else name,
            textId=self._string(name) if is_new else None,
            globalTid=thread,
        )

    def _call(self, begin: int, end: int, name: str, chain: int | None = None) -> int:
        self._correlation += 1
        self._insert(
            "CUPTI_ACTIVITY_KIND_RUNTIME",
            start=1000 * begin,
            end=1000 * end,
            globalTid=1,
            correlationId=self._correlation,
            nameId=self._string(name),
            callchainId=chain,
        )
        return self._correlation

    def kernel(self, begin: int, end: int, name: str, *, launched: int, stream: int) -> None:
        text = self._string(name)
        self._insert(
            "CUPTI_ACTIVITY_KIND_KERNEL",
            start=1000 * begin,
            end=1000 * end,
            streamId=stream,
            correlationId=self._call(launched, launched + 5, "cudaLaunchKernel_v7000"),
            demangledName=text,
            shortName=text if self._schema == "old" else self._string("short"),
        )

    def copy(self, begin: int, end: int, *, launched: int, stream: int, num_bytes: int) -> None:
        self._insert(
            "CUPTI_ACTIVITY_KIND_MEMCPY",
            start=1000 * begin,
            end=1000 * end,
            streamId=stream,
            correlationId=self._call(launched, launched + 2, "cudaMemcpyAsync_v3020"),
            bytes=num_bytes,
            copyKind=1,
        )

    def wait(self, begin: int, end: int) -> None:
        number = self._call(begin, end, "cudaStreamSynchronize_v3020", chain=1)
        if self._schema == "new":
            span = {"start": 1000 * begin, "end": 1000 * end, "correlationId": number}
            self._insert("CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", **span, syncType=3)
            self._insert("CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", **span, syncType=2)
            if begin < 1000:
                for depth, symbol in enumerate(("cudaStreamSynchronize", "at::item")):
                    text = self._string(symbol)
                    self._insert("CUDA_CALLCHAINS", id=1, symbol=text, stackDepth=depth)

    def diagnose(self, severity: int, text: str) -> None:
        self._insert("DIAGNOSTIC_EVENT", timestamp=0, severity=severity, text=text)
