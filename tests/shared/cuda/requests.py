"""What the warps of emulated kernels ask of memory, counted and found in the source.

`counted_requests(file)` is a context in which the emulator counts (runtime/memory/requests.h says
what), `read_requests(file)` gives a row for each kernel, line and kind of access.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.shared.cuda.emulator import CHECKOUT, COPIES, CUDA, EMULATOR, ROOT, runtime

# Of all kernels: a line that calls them says more.
_HELPERS = tuple(CHECKOUT / folder.relative_to(ROOT) for folder in (EMULATOR, CUDA / "include"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LineRequests:
    """The requests of one kind that a line of a kernel makes, over all of its launches."""

    kernel: str
    file: str
    line: int
    memory: str
    """global, shared or barrier."""
    access: str
    """read, write, atomic or barrier."""
    requests: int
    """Of warps; of a barrier 0."""
    lanes: int
    units: int
    """Sectors of 32 bytes in global memory, wavefronts in shared memory, arrivals at a barrier."""

    @property
    def source(self) -> str:
        """The text of the line, by which it is known when lines move."""
        return Path(self.file).read_text().splitlines()[self.line - 1].strip()


@contextmanager
def counted_requests(file: Path) -> Iterator[None]:
    """Within it, the requests of each launch are a line of JSON at the end of the file."""
    runtime().m3i_emulator_count_requests(str(file).encode())
    try:
        yield
    finally:
        runtime().m3i_emulator_count_requests(None)


def read_requests(file: Path, *, copies: Path = CUDA) -> list[LineRequests]:
    """Return what was counted, the most units first.

    copies: the folder that the kernels were built from, where it is outside of this checkout.
    """
    launches = [json.loads(line) for line in file.read_text().splitlines()]
    lines = _lines_of([place for launch in launches for place in launch["places"]])
    sums: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0])
    for launch in launches:
        for place in launch["places"]:
            file_line = lines.get((place.get("module"), place.get("offset")))
            source, line = file_line or (place["file"], place["line"])
            for name, folder in ((CHECKOUT, ROOT), (COPIES, copies)):
                if Path(source).is_relative_to(name):
                    source = str(folder / Path(source).relative_to(name))
            total = sums[launch["kernel"], source, line, place["memory"], place["access"]]
            for i, name in enumerate(("requests", "lanes", "units")):
                total[i] += place[name]
    rows = [
        LineRequests(
            kernel=kernel,
            file=source,
            line=line,
            memory=memory,
            access=access,
            requests=total[0],
            lanes=total[1],
            units=total[2],
        )
        for (kernel, source, line, memory, access), total in sums.items()
    ]
    return sorted(rows, key=lambda row: -row.units)


def _lines_of(places: Sequence[dict[str, Any]]) -> dict[tuple[str, int], tuple[str, int]]:
    """Return file and line of instructions, of those inlined to one the kernel's own."""
    offsets: defaultdict[str, set[int]] = defaultdict(set)
    for place in places:
        if place.get("module"):
            offsets[place["module"]].add(place["offset"])
    found = {}
    for module, of_module in offsets.items():
        asked = [hex(offset) for offset in sorted(of_module)]
        done = subprocess.run(
            ["addr2line", "-a", "-i", "-e", module, *asked],
            capture_output=True,
            text=True,
            check=True,
        )
        frames: list[tuple[str, int]] = []
        for line in reversed(done.stdout.splitlines()):  # an address, then its frames
            if line.startswith("0x"):
                found[module, int(line, 16)] = _own(frames[::-1])
                frames = []
            else:
                name, _, number = line.partition(" ")[0].rpartition(":")
                frames.append((name, int(number) if number.isdigit() else 0))
    return found


def _own(frames: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """Return the innermost frame that is not in a header of all kernels."""
    for name, line in frames:
        path = Path(name).resolve()
        if not any(path.is_relative_to(folder) for folder in _HELPERS):
            return str(path), line
    return frames[0]
