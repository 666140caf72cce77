"""Traces of the null CUDA runtime: read, checked against their schema, and summed up by step.

Also the names of the kernels that a call launches, on the null runtime or on a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The keys of each kind of record, beside `kind`, `thread` and `device`: those it always has, and
# those it may have. cuda/null/README.md says what they mean.
KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    kind: (frozenset(always.split()), frozenset(maybe.split()))
    for kind, always, maybe in (
        ("launch", "name grid block shared stream architecture", "cluster capture line"),
        ("library", "library call stream", "capture line"),
        ("copy", "call from to bytes stream", "capture line"),
        ("collective", "call stream bytes rank ranks communicator", "capture line"),
        ("fill", "bytes stream", "capture line"),
        ("wait", "call stream", "line"),
        ("allocate", "side bytes", "line"),
        ("free", "side bytes", ""),
        ("capture", "state capture", "stream nodes launches"),
        ("replay", "capture nodes launches stream", ""),
        ("error", "code call", "line"),
        ("fault", "what", "line"),
        ("unsupported", "library call", "line"),
        ("mark", "name", ""),
    )
}
EVERY_KIND = frozenset({"kind", "thread", "device"})

BACKWARD = "backward of "  # a mark of backward_lines.py: what follows on its thread is so

Record = dict[str, Any]


def read_trace(path: Path) -> Iterator[Record]:
    """Yield the records of a trace in order.

    Raises ValueError, with the file and line, for what is no record of `KEYS`.
    """
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                always, maybe = KEYS[record["kind"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: expected a record, got {line!r}") from error
            keys = record.keys() - EVERY_KIND
            if not always <= keys <= always | maybe:
                wrong = sorted(keys ^ always - maybe)
                raise ValueError(
                    f"{path}:{number}: expected the keys {sorted(always)} of a {record['kind']}, "
                    f"got {sorted(keys)}; {wrong} differ"
                )
            yield record


@dataclass(slots=True)
class StepTrace:
    """What happened between two marks."""

    name: str
    records: list[Record] = field(default_factory=list)

    def of(self, kind: str) -> list[Record]:
        """Return the records of a kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def num_launches(self) -> int:
        """Kernels that a GPU would run: launched, called of a library, or replayed in a graph.

        What is captured runs at replays alone, and counts there.
        """
        direct = [r for r in (*self.of("launch"), *self.of("library")) if "capture" not in r]
        return len(direct) + sum(record["launches"] for record in self.of("replay"))

    @property
    def host_launches(self) -> int:
        """Calls of the host that start work: a replay is one, whatever it holds."""
        direct = [r for r in (*self.of("launch"), *self.of("library")) if "capture" not in r]
        return len(direct) + len(self.of("replay"))

    @property
    def copies(self) -> Counter[tuple[str, str]]:
        """Return the number of copies by where from and where to: ("pageable", "device")."""
        return Counter((record["from"], record["to"]) for record in self.of("copy"))

    @property
    def copied_bytes(self) -> Counter[tuple[str, str]]:
        """Return bytes copied by where from and where to."""
        total: Counter[tuple[str, str]] = Counter()
        for record in self.of("copy"):
            total[record["from"], record["to"]] += record["bytes"]
        return total

    @property
    def streams(self) -> frozenset[int]:
        """Return the streams that were given work."""
        kinds = ("launch", "library", "copy", "fill", "replay")
        return frozenset(r["stream"] for r in self.records if r["kind"] in kinds)


def split_at_marks(records: Iterable[Record]) -> list[StepTrace]:
    """Return what follows each mark up to the next; what precedes the first is named "start".

    Marks of a backward pass begin no step: what its thread launches from there on has their line.
    """
    steps = [StepTrace("start")]
    backward: dict[int, str] = {}
    for record in records:
        if record["kind"] != "mark":
            line = backward.get(record["thread"])
            own = record["kind"] not in ("launch", "library", "copy", "fill") or "line" in record
            steps[-1].records.append(record if own or not line else {**record, "line": line})
        elif record["name"].startswith(BACKWARD):
            backward[record["thread"]] = record["name"]
        else:
            steps.append(StepTrace(record["name"]))
            backward.clear()
    return steps


def peak_device_bytes(records: Iterable[Record]) -> int:
    """Return the most bytes of a device that were allocated at one time, over all devices."""
    held: Counter[int] = Counter()
    peak = 0
    for record in records:
        if record.get("side") != "device" or record["kind"] not in ("allocate", "free"):
            continue
        sign = 1 if record["kind"] == "allocate" else -1
        held[record["device"]] += sign * record["bytes"]
        peak = max(peak, held[record["device"]])
    return peak


def lines_of(records: Iterable[Record]) -> Counter[str]:
    """Return how often each Python line stands in the records; "?" where a record has none."""
    return Counter(record.get("line", "?") for record in records)


# ---- Kernels of a call ---------------------------------------------------------------------------


def launched(call: Callable[[], object]) -> list[str]:
    """Return the names of the kernels that a call launches on the current GPU.

    On a GPU torch's profiler names them; on the null runtime the trace of NULL_CUDA_TRACE, with
    the calls of libraries.
    """
    mark = getattr(ctypes.CDLL(None), "null_cuda_mark", None)
    if mark is None:
        return _profiled(call)
    mark(b"counted")
    call()
    mark(b"end")
    steps = split_at_marks(read_trace(Path(os.environ["NULL_CUDA_TRACE"])))
    counted = [step for step in steps if step.name == "counted"][-1]
    names = [record["name"] for record in counted.of("launch")]
    return names + [record["call"] for record in counted.of("library")]


def _profiled(call: Callable[[], object]) -> list[str]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events: Any = profiled.events()
    names = [event.name for event in events if event.device_type.name == "CUDA"]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]


def our_kernel(symbol: str) -> str | None:
    """Return the name of a kernel of ours with its template arguments; None for others."""
    found = re.search(r"(\w+(?:<.*>)?)\(", symbol)
    return found[1].replace("m3i::", "") if found and "m3i::" in symbol else None
