"""The constants of the cost model, each with its source: none is chosen for one kernel.

All but those marked *recollection* were read in the source that stands beside them. A rate that a
microbenchmark measured is taken before a maker's peak, which no kernel reaches; where several
values are published, `others` names those that were not taken. Clocks, multiprocessors and peaks of
memory are those of m3i_fast/costs/gpus.py, from NVIDIA's data sheets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m3i_fast.costs.gpus import CARDS

ERNST = "D. Ernst, gpu-benches (github.com/te42kyfo/gpu-benches, 1c36d50, 2024)"
BEKMAN = "S. Bekman, Machine Learning Engineering (github.com/stas00/ml-engineering, 744d01e, 2026)"
SHANKHDHAR = "P. Shankhdhar, Outperforming cuBLAS on H100: a Worklog (2024)"
WHITE_PAPERS = "NVIDIA, A100 (2020) and H100 (2022) Tensor Core GPU Architecture, white papers"
DATA_SHEETS = "m3i_fast/costs/gpus.py, from NVIDIA's data sheets"
NAMES = ("a100", "h100", "h200", "gh200")
GH200_BYTE_S = 4e12  # of the 96 GB card; 4.9e12 with 144 GB


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """A rate or a count of each card, and where it comes from."""

    unit: str
    source: str
    others: str = ""
    """Published values that were not taken, or what is doubtful."""
    alternatives: tuple[Mapping[str, float], ...] = ()
    """Of those, by card, what `sensitivity` tries."""
    values: Mapping[str, float]
    """By card, of NAMES."""


def _same(value: float) -> dict[str, float]:
    return dict.fromkeys(NAMES, value)


def _like_h100(a100: float, h100: float) -> dict[str, float]:
    return {"a100": a100, **dict.fromkeys(NAMES[1:], h100)}


# Of the rate of the data sheet, what a kernel that only reads reaches on an A100.
_READ_SHARE = 1880e9 / CARDS["a100"].memory_byte_s
# Of an H100 PCIe, whose L2 cache read 6,950 GB/s by 114 multiprocessors at 1.755 GHz.
_L2_BYTES_A_CLOCK = 6950e9 / 114 / 1.755e9

CONSTANTS: dict[str, Constant] = {
    "multiprocessors": Constant(
        unit="",
        source=DATA_SHEETS,
        values=_like_h100(CARDS["a100"].multiprocessors, CARDS["h100"].multiprocessors),
    ),
    "clock": Constant(
        unit="GHz",
        source=DATA_SHEETS + ": the clock at which the BF16 peak holds",
        others="an H100 boosts to 1.98 and drops below 1.4 at its limit of power",
        values=_like_h100(CARDS["a100"].clock_hz / 1e9, CARDS["h100"].clock_hz / 1e9),
    ),
    "memory": Constant(
        unit="GB/s",
        source=f"{ERNST}, gpu-l2-cache beyond the cache: 1,880 read on an A100 80 GB, which is 92 "
        "% of its peak, and 3,890 on an H200; 92 % of the peak for an H100 SXM and a GH200 (96 GB)",
        alternatives=({"a100": 1700, "h200": 3100},),
        others="the same author's streams that read and write as much: 1,700 to 1,770 on an A100, "
        "3,100 to 3,500 on an H200; an H100 PCIe reads 98 % of its peak, an H200 81 %",
        values={
            "a100": 1880,
            "h100": _READ_SHARE * CARDS["h100"].memory_byte_s / 1e9,
            "h200": 3890,
            "gh200": _READ_SHARE * GH200_BYTE_S / 1e9,
        },
    ),
    "l2": Constant(
        unit="GB/s",
        source=f"{ERNST}, gpu-l2-cache: 5,400 on an A100, 9,750 on an H200; 6,950 on an H100 PCIe, "
        "as many bytes a clock and multiprocessor for an H100 SXM and a GH200",
        others="the same author's gpu-cache: 4,660 on an A100; 7,200 by the maker's 5,120 bytes a "
        "clock of an A100 (recollection)",
        alternatives=({"a100": 4660}, {"a100": 7200}),
        values={
            "a100": 5400,
            "h100": _L2_BYTES_A_CLOCK * 132 * CARDS["h100"].clock_hz / 1e9,
            "h200": 9750,
            "gh200": _L2_BYTES_A_CLOCK * 132 * CARDS["h100"].clock_hz / 1e9,
        },
    ),
    "atomics": Constant(
        unit="sectors a clock",
        source="a sector a clock and slice. Nsight Compute's counters of a backward rasterizer on "
        "an L4, in a public repository's Rasterizer Design Notes (read in 2026): 376,550,778 "
        "sectors of RED keep its L2's atomic units 59.67 % busy for 26,214,542 clocks, 29,409,057 "
        "keep them 13.65 % busy for 8,944,626: 24.1 sectors a clock both times. 24 slices on an "
        "L4, 80 on an A100 and on an H100 (recollection)",
        others="NVIDIA publishes no rate; whether a sector of eight numbers takes longer than one "
        "of one number was not measured",
        values=_same(80),
    ),
    "wavefronts": Constant(
        unit="a clock and multiprocessor",
        source=f"{ERNST}, README: all three generations move close to 128 bytes a clock",
        values=_same(1),
    ),
    "lines": Constant(
        unit="wavefronts for each line of 128 bytes that a request touches beyond its first",
        source=f"{ERNST}, gpu-strides: loads of 32, 16, 8, 4, 2 and 1 lines take 9.2, 5.1, 3.1, "
        "2.1, 1.3 and 1 clocks on an A100, 9.3, 4.8, 3.0, 2.1, 1.5 and 1 on an H200",
        others="reductions and stores are taken to be as loads",
        values=_same(0.265),
    ),
    "issue": Constant(
        unit="warp instructions a clock and multiprocessor",
        source=f"{WHITE_PAPERS}: four schedulers, one instruction a clock each",
        values=_same(4),
    ),
    "sustained": Constant(
        unit="of wavefronts and issue slots",
        source="Nsight Compute's rule on Speed of Light (recollection): below 60 % of a peak a "
        "kernel waits for latencies, above 80 % it uses the unit well; the middle of the two, "
        "chosen with the published times of DCNv3 and DCNv4 in view",
        others="0.6 and 0.8",
        alternatives=(_same(0.6), _same(0.8)),
        values=_same(0.7),
    ),
    "exponentials": Constant(
        unit="a clock and multiprocessor",
        source="NVIDIA, CUDA C++ Programming Guide, throughput of native arithmetic (recollection)",
        values=_same(16),
    ),
    "tensor": Constant(
        unit="TFLOP/s, bf16",
        source=f"what cuBLAS reaches. A100: {BEKMAN}, 271.2. H100: {SHANKHDHAR}, 716 at 4,096 "
        "cubed on normal numbers; taken for an H200 and a GH200 as well, the same chip, with the "
        "published time of siglip-kernel in view",
        others=f"the best of many shapes by {BEKMAN}: 794.5 on an H100, 828.6 on a GH200; peaks "
        "are 312 and 989",
        alternatives=({"a100": 271.2, "h100": 794.5, "h200": 794.5, "gh200": 828.6},),
        values=_like_h100(271.2, 716),
    ),
    "l1": Constant(
        unit="KiB, with shared memory",
        source=f"{ERNST}, README: 192 on an A100, 256 on an H100",
        values=_like_h100(192, 256),
    ),
    "launch": Constant(
        unit="us",
        source=f"{ERNST}, gpu-small-kernels: kernels of 64 KiB one after the other in a stream, 24 "
        "to 26 GB/s on an A100 and on an H200",
        others="with a CUDA graph about half of it",
        values=_same(2.5),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """A card's rates a second, and its counts, as `CONSTANTS` has them."""

    card: str
    multiprocessors: int
    clock_hz: float
    memory_byte_s: float
    l2_byte_s: float
    atomic_sector_s: float
    """Sectors that reductions and atomics touch in the L2 cache."""
    wavefront_s: float
    """Of all multiprocessors, as are the next two; a sustained rate."""
    issue_s: float
    """Warp instructions; a sustained rate."""
    exponential_s: float
    tensor_flop_s: float
    l1_bytes: float
    launch_s: float


def rates_of(card: str, **others: float) -> Rates:
    """Return a card's rates; others: values of CONSTANTS in the place of those taken.

    Raises ValueError for a card without constants.
    """
    if card not in NAMES:
        raise ValueError(f"card: expected one of {', '.join(NAMES)}, got {card!r}")
    value = {name: constant.values[card] for name, constant in CONSTANTS.items()} | others
    clock = value["clock"] * 1e9
    multiprocessors = int(value["multiprocessors"])
    clocks = multiprocessors * clock
    return Rates(
        card=card,
        multiprocessors=multiprocessors,
        clock_hz=clock,
        memory_byte_s=value["memory"] * 1e9,
        l2_byte_s=value["l2"] * 1e9,
        atomic_sector_s=value["atomics"] * clock,
        wavefront_s=value["sustained"] * value["wavefronts"] * clocks,
        issue_s=value["sustained"] * value["issue"] * clocks,
        exponential_s=value["exponentials"] * clocks,
        tensor_flop_s=value["tensor"] * 1e12,
        l1_bytes=value["l1"] * 1024,
        launch_s=value["launch"] * 1e-6,
    )
