"""What the machine code of the CUDA kernels is made of, without a GPU and without reading it.

    m3i-fast bench sass --op dcnv3                                     a row a kernel
    m3i-fast bench sass --op dcnv3 --kernels 'dcnv3_kernel<float, 4.*' --details
    m3i-fast bench sass --op dcnv3 --json before.json                  then change the kernel
    m3i-fast bench sass --op dcnv3 --baseline before.json              and see what changed

Kernels are compiled by nvcc as the build does and taken apart by nvdisasm; --file reads a cubin, or
a library that was built, instead. Every instruction is counted once, in whatever loop it stands.
--trips says how often loops run, and then the instructions that a warp issues are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.durable_files import write_atomically
from m3i_fast.op_registry import OPS
from m3i_fast.terminal import make_console

if TYPE_CHECKING:  # torch, which --help does without
    from m3i_fast.benchmarks.core.sass.disassembly import Kernel
    from m3i_fast.benchmarks.core.sass.figures import Figures

SUBJECT = "sass"
# Column -> the classes of instructions that it adds up.
COLUMNS = {
    "fp32": ("fp32",),
    "half": ("half",),
    "int": ("integer",),
    "imad": ("imad",),
    "xu": ("mufu", "convert"),
    "tensor": ("tensor",),
    "global": ("global",),
    "shared": ("shared",),
    "atomic": ("atomic",),
    "shuffle": ("shuffle",),
    "control": ("control", "barrier", "tensor wait"),
    "uniform": ("uniform", "constant"),
    "other": ("fp64", "local", "tma", "other"),
}
_WIDTHS = {head: max(6, len(head) + 1) for head in COLUMNS}
NEXT = (
    "next: --details for widths, atomics and loops of each kernel; --kernels REGEX for fewer; "
    "--json FILE before a change, --baseline FILE after it"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Count the instructions of the CUDA kernels by what executes them; no GPU is needed."""

    op: str = "all"
    """Whose kernels: an op's name, as dcnv3, or all."""
    architecture: Literal["80", "90a"] = "80"
    """Compute capability that they are compiled for: 80 is an A100's, 90a an H100's."""
    kernels: str = ""
    """Regular expression: only kernels whose whole short name matches, as 'dcnv3_kernel<.*'."""
    file: Path | None = None
    """Read this cubin or built library, as _C_cuda.abi3.so, instead of compiling the sources."""
    details: bool = False
    """Also list widths of accesses, atomics, loads in flight and loops of each kernel."""
    trips: str = ""
    """How often loops run, to count what a warp issues: FILE:LINE=N of a loop's line, NUMBER=N of a
    loop of --details, other=N of all that are not named; with commas between."""
    shares: str = ""
    """With --trips: how often code is reached, FILE:LINE=X or FILE:FIRST-LAST=X, as 'a.cu:7-9=0';
    '$NAME=0' leaves out calls of a subroutine; with commas between."""
    json: Path | None = None
    """Write all figures to this file."""
    baseline: Path | None = None
    """A file that --json wrote: show what changed since then."""

    def __post_init__(self) -> None:
        names = [op.name for op in OPS]
        if self.op not in ("all", *names):
            raise ValueError(f"op: expected all or one of {', '.join(names)}; got {self.op!r}")
        try:
            re.compile(self.kernels)
        except re.error as error:
            raise ValueError(
                f"kernels: expected a regular expression, got {self.kernels!r}: {error}"
            ) from None
        if self.shares and not self.trips:
            raise ValueError("shares: expected with --trips, as --trips other=1")

    def ops(self) -> list[str]:
        return [op.name for op in OPS] if self.op == "all" else [self.op]


def main(argv: list[str] | None = None) -> int:
    """Print the report, and write it where a file is named."""
    cfg = read_command(Config, SUBJECT, argv)
    from m3i_fast.benchmarks.core.sass.figures import figures_of
    from m3i_fast.benchmarks.sass.changes import read_report

    before = read_report(cfg.baseline) if cfg.baseline else None  # wrong before minutes of nvcc
    found = wanted_kernels(cfg)
    rows = [figures_of(kernel, architecture) for architecture, kernel in found]
    console = make_console()
    console.print("\n".join(overview(rows)), highlight=False, soft_wrap=True)
    if cfg.details:
        for row in rows:
            console.print("\n".join(details(row)), highlight=False, soft_wrap=True)
    if cfg.trips:
        for _, kernel in found:
            console.print("\n".join(told_issued(cfg, kernel)), highlight=False, soft_wrap=True)
    reports = [row.to_json() for row in rows]
    if before is not None:
        show_changes(before, reports)
    if cfg.json:
        text = json.dumps({"kernels": reports}, indent=1) + "\n"
        write_atomically(cfg.json, text.encode())
    if not cfg.details and before is None and not cfg.trips:
        console.print(NEXT, highlight=False, soft_wrap=True)
    return 0


def wanted_kernels(cfg: Config) -> list[tuple[str, Kernel]]:
    """Return architecture and kernel of all that is asked for. Raises ValueError without any."""
    every = list(_kernels(cfg))
    found = [
        (architecture, kernel)
        for architecture, kernel in every
        if not cfg.kernels or re.fullmatch(cfg.kernels, kernel.name)
    ]
    if not found:
        names = "; ".join(dict.fromkeys(kernel.name for _, kernel in every))
        raise ValueError(f"kernels: expected to match one of {names}; got {cfg.kernels!r}")
    return found


def _kernels(cfg: Config) -> Iterator[tuple[str, Kernel]]:
    from m3i_fast.benchmarks.sass.code import kernels_of_file, kernels_of_op

    if cfg.file:
        yield from kernels_of_file(cfg.file)
        return
    for op in cfg.ops():
        yield from ((cfg.architecture, kernel) for kernel in kernels_of_op(op, cfg.architecture))


# ---- Tables --------------------------------------------------------------------------------------


def overview(rows: Sequence[Figures]) -> Iterator[str]:
    """Yield two lines a kernel: what it is, and its instructions by class below their heads."""
    yield "".join(f"{head:>{width}}" for head, width in _WIDTHS.items())
    for row in rows:
        told = f"{row.kernel}  {row.instructions:,} instructions, {row.registers} registers"
        told += f", loops: {len(row.loops)}, loads in flight: {row.most_in_flight}"
        yield told + (f", {row.spills} SPILLS" if row.spills else "")
        counts = {head: sum(row.by_class.get(c, 0) for c in COLUMNS[head]) for head in COLUMNS}
        yield "".join(
            f"{counts[head] or '.':>{width}{',' if counts[head] else ''}}"
            for head, width in _WIDTHS.items()
        )


def details(row: Figures) -> Iterator[str]:
    """Yield lines with what the overview leaves out."""
    yield f"\n{row.kernel}, sm_{row.architecture}: {row.instructions:,} instructions"
    yield "  pipes      " + _listed(row.by_pipe)
    yield "  classes    " + _listed(row.by_class)
    yield "  accesses   " + (_times(row.accesses) or "none")
    yield "  atomics    " + (_times(row.atomics) or "none")
    waits = [f"{number} at {count}" for number, count in row.loads_in_flight.items()]
    yield "  in flight  " + (", ".join(waits) + " waits" if waits else "no load from global memory")
    if row.tensor_between_waits:
        products = " ".join(map(str, row.tensor_between_waits))
        yield f"  products   between waits {products}"
    yield (
        f"  branches   {row.branch_share:.1%}, predicated {row.predicated_share:.1%}, "
        f"longest block {row.longest_block}"
    )
    for loop in row.loops:
        inside = f", {loop.own} its own" if loop.own != loop.instructions else ""
        place = f" at {loop.line}" if loop.line else ""
        yield f"  {'  ' * (loop.depth - 1)}loop {loop.number}{place}: {loop.instructions}{inside}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _times(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} x {name}" for name, count in counts.items())


def told_issued(cfg: Config, kernel: Kernel) -> Iterator[str]:
    """Yield lines with the instructions that a warp issues."""
    from m3i_fast.benchmarks.core.sass.flow import analyse
    from m3i_fast.benchmarks.core.sass.issued import issued

    trips = {_key(key): value for key, value in _pairs("trips", cfg.trips)}
    other = trips.pop("other", None)
    shares = dict(_pairs("shares", cfg.shares))
    flow = analyse(kernel)
    found = issued(flow, trips, shares=shares, other_trips=other)
    yield f"\n{kernel.name}: a warp issues {found.total:,.0f}"
    for title, counts in (("pipes", found.by_pipe), ("classes", found.by_class)):
        yield f"  {title:<8} " + ", ".join(f"{name} {n:,.0f}" for name, n in counts.items())
    loops = [
        f"{'outside' if number is None else f'loop {number}'} {count:,.0f}"
        for number, count in sorted(found.by_loop.items(), key=lambda item: item[0] or 0)
    ]
    yield "  where    " + ", ".join(loops)


def _pairs(flag: str, text: str) -> Iterator[tuple[str, float]]:
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"\s*(.+)=(\d+(?:\.\d*)?)\s*", part)
        if not found:
            raise ValueError(f"--{flag}: expected PLACE=NUMBER with commas between, got {part!r}")
        yield found[1], float(found[2])


def _key(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def show_changes(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> None:
    """Print what changed, kernel by kernel."""
    from m3i_fast.benchmarks.sass.changes import changes, only_in_one

    console = make_console()
    for line in only_in_one(before, now):
        console.print(line, highlight=False)
    found = changes(before, now)
    if not found:
        console.print("nothing else changed")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("kernel", "what"):
        table.add_column(head)
    for head in ("before", "now", "change"):
        table.add_column(head, justify="right")
    last = ""
    for each in found:
        name = f"{each.kernel}, sm_{each.architecture}"
        share = "" if each.share is None else f"{each.share:+.1%}"
        shown = name if name != last else ""
        table.add_row(shown, each.what, f"{each.before:,}", f"{each.now:,}", share)
        last = name
    console.print(table)
