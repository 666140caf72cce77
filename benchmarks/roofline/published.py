"""Times that others published for kernels of theirs, and what the model predicts for these.

Kernels are described as their sources have them: threads, widths of accesses, tiles. Instructions
were counted in the machine code that nvcc 13.0 makes of these sources for sm_80: those of a warp
outside its loops, of a column of the 3 x 3 grid, of a point, and of a point inside the image. The
compiler of the publications was an older one. Nothing here was measured by this project.

Two constants were chosen with these times in view: the sustained share of issue slots, in the
middle of the two that Nsight Compute's rule names, and cuBLAS's rate on an H100, of the published
ones the lower. `sensitivity` says what each of the others would predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m3i_fast.costs.kernels.constants import CONSTANTS, rates_of
from m3i_fast.costs.kernels.gather import Sampling
from m3i_fast.costs.kernels.model import (
    LINE,
    SECTOR,
    CallPrediction,
    Phase,
    gemm,
    predict,
    request_wavefronts,
)

DCNV4 = "Y. Xiong et al., Efficient Deformable ConvNets, arXiv 2401.06197 (2024), A100 80 GB"
DCNV4_NOTE = "OpenGVLab/DCNv4, scripts/test_dcnv4_bwd.py (2024), unit not stated: 3.2 to 3.7 ms"
SIGLIP = "siglip-kernel 0.1.2, its description on PyPI (avocardio, 2026), GH200"
QUACK = "linkedin/Liger-Kernel, docstring of its CuTe linear cross entropy (2026), H200"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A published time, and the phases that the model predicts it from."""

    name: str
    card: str
    ms: float
    source: str
    phases: tuple[Phase, ...]
    is_required: bool = False
    """Whether the prediction has to be within `WITHIN` of it; others are shown."""

    def predicted(self) -> CallPrediction:
        """Return the prediction."""
        return predict(self.phases, rates_of(self.card))

    @property
    def ratio(self) -> float:
        """Return predicted / published."""
        return self.predicted().ms / self.ms


WITHIN = 0.3


# ---- Deformable convolution ----------------------------------------------------------------------


# The operators' own benchmark: 64 x 56 x 56, 4 groups of 32, offsets in +-10 pixels, scaled by 2,
# which also spreads the grid; the one of the backward has +-2.
def _sampling(size: int, offset: float) -> Sampling:
    return Sampling(
        batch=64, height=56, width=56, channels=128, groups=4, size=size, reach=2 * offset, spread=2
    )


def dcnv3_forward(size: int) -> tuple[Phase, ...]:
    """One thread an output value: a warp has the 32 channels of one pixel and group.

    A corner is a request of 32 * size bytes; offsets and mask are read by all lanes at once, 2 + 1
    requests a point. Before it the output is filled with zeros.
    """
    call = _sampling(size, 10.0)
    warps = call.units
    valid = call.points * call.valid_share()
    gathered = call.corners() * 32 * size / SECTOR
    inputs = call.pixels * call.channels * size + 3 * call.points * size
    outputs = call.pixels * call.channels * size
    l1 = rates_of("a100").l1_bytes
    return (
        Phase(name="zeros", memory_bytes=outputs, write_sectors=outputs / SECTOR),
        Phase(
            name="forward",
            memory_bytes=inputs + outputs,
            read_sectors=gathered * call.missing_share(16, l1) + 3 * call.points * size / SECTOR,
            write_sectors=outputs / SECTOR,
            wavefronts=call.corners() + 3 * call.points + warps,
            instructions=176 * warps + 3 * 10 * warps + 24 * call.points + 63 * valid,
        ),
    )


def dcnv4_forward(size: int) -> tuple[Phase, ...]:
    """Eight channels a thread: a warp has 8 pairs of a pixel and a group, all at other places.

    So a point's code runs for all of them where it runs for one. A corner is a request of 8 lines,
    of two accesses in fp32; offsets and mask are scalars, in 8 x 54 (or 108) bytes.
    """
    call = _sampling(size, 10.0)
    warps = call.units / 8
    inputs = call.pixels * (call.channels + 112) * size  # 3 K G = 108, rounded up to 112
    outputs = call.pixels * call.channels * size
    gathered = call.corners() * 32 * size / SECTOR
    corner = request_wavefronts(8, 512) * size / 2
    scalar = request_wavefronts(8 * 27 * size / LINE, 32 * size)
    l1 = rates_of("a100").l1_bytes
    point = {2: 172, 4: 150}[size]
    return (
        Phase(
            name="forward",
            memory_bytes=inputs + outputs,
            read_sectors=gathered * call.missing_share(112, l1) + call.pixels * 112 * size / SECTOR,
            write_sectors=outputs / SECTOR,
            wavefronts=call.corners() / 8 * corner + warps * (27 * scalar + 4 * size / 2),
            instructions=warps * (155 + 3 * 11 + 9 * point),
        ),
    )


def dcnv4_backward() -> tuple[Phase, ...]:
    """One channel a thread, fp16, with scalar reductions in fp32, 4 sectors a request.

    Gradients in fp32 are filled with zeros before and cast to fp16 after.
    """
    call = _sampling(2, 2.0)
    warps = call.units
    image = call.pixels * call.channels
    points = call.pixels * 112
    zeros = 4.0 * (image + points)
    l1 = rates_of("a100").l1_bytes
    return (
        Phase(name="zeros", memory_bytes=zeros, write_sectors=zeros / SECTOR),
        Phase(
            name="backward",
            memory_bytes=2 * (2 * image + points) + 4 * points + 8 * image,
            read_sectors=call.corners() * 2 * call.missing_share(16, l1)
            + 2 * (image + points) / SECTOR,
            write_sectors=4 * points / SECTOR,
            atomic_sectors=call.corners() * 4,
            wavefronts=2 * call.corners() + 3 * call.points + 3 * 5 * call.points + 2 * warps,
            instructions=300 * warps + 3 * 9 * warps + 76 * call.points
            + 186 * call.points * call.valid_share(),
        ),
        Phase(name="casts", memory_bytes=6.0 * (image + points)),
    )  # fmt: skip


# ---- Losses of all pairs -------------------------------------------------------------------------


def siglip_kernel(rows: int, width: int, chunk: int = 4096) -> tuple[Phase, ...]:
    """Chunks of rows: logits by cuBLAS, the loss in place over them in bf16, two products more.

    The gradient by the texts is added up in bf16 over the chunks. About 20 instructions an element
    of the loss, two of them of the special function unit: estimated from the algorithm.
    """
    times = rows // chunk
    logits = 2.0 * chunk * rows
    features = 2.0 * rows * width
    own = 2.0 * chunk * width
    return (
        gemm("logits", chunk, rows, width, bytes_moved=logits + features + own, times=times),
        Phase(
            name="loss",
            memory_bytes=2 * logits,
            read_sectors=logits / SECTOR,
            write_sectors=logits / SECTOR,
            wavefronts=2 * logits / LINE,
            instructions=20 * chunk * rows / 32,
            exponentials=2.0 * chunk * rows,
            times=times,
        ),
        gemm("images", chunk, width, rows, bytes_moved=logits + features + own, times=times),
        gemm("texts", rows, width, chunk, bytes_moved=logits + own + 2 * features, times=times),
    )


def linear_cross_entropy(tokens: int, width: int, classes: int) -> tuple[Phase, ...]:
    """Three products over all logits in bf16, and a pass over them in place."""
    logits = 2.0 * tokens * classes
    features, weights = 2.0 * tokens * width, 2.0 * classes * width
    moved = logits + features + weights
    return (
        gemm("logits", tokens, classes, width, bytes_moved=moved),
        Phase(
            name="loss",
            memory_bytes=2 * logits,
            wavefronts=2 * logits / LINE,
            instructions=20 * tokens * classes / 32,
            exponentials=1.0 * tokens * classes,
        ),
        gemm("tokens", tokens, width, classes, bytes_moved=moved),
        gemm("classes", classes, width, tokens, bytes_moved=moved),
    )


def all_published() -> list[Published]:
    """Return every published time, the worst prediction first."""
    found: Sequence[Published] = (
        Published(
            name="siglip-kernel, 65,536 x 768, bf16, forward + backward",
            card="gh200",
            ms=46.9,
            source=SIGLIP,
            phases=siglip_kernel(65536, 768),
            is_required=True,
        ),
        Published(
            name="DCNv4 forward, 64 x 56 x 56 x 128, 4 groups, fp16",
            card="a100",
            ms=0.404,
            source=DCNV4,
            phases=dcnv4_forward(2),
            is_required=True,
        ),
        Published(
            name="DCNv3 forward, 64 x 56 x 56 x 128, 4 groups, fp16",
            card="a100",
            ms=1.52,
            source=DCNV4,
            phases=dcnv3_forward(2),
            is_required=True,
        ),
        Published(
            name="DCNv4 forward, 64 x 56 x 56 x 128, 4 groups, fp32",
            card="a100",
            ms=0.606,
            source=DCNV4,
            phases=dcnv4_forward(4),
        ),
        Published(
            name="DCNv4 backward, 64 x 56 x 56 x 128, 4 groups, fp16",
            card="a100",
            ms=3.2,
            source=DCNV4_NOTE,
            phases=dcnv4_backward(),
        ),
        Published(
            name="QuACK linear cross entropy, 4,096 x 4,096 x 128,256, bf16",
            card="h200",
            ms=17.33,
            source=QUACK,
            phases=linear_cross_entropy(4096, 4096, 128256),
        ),
        Published(
            name="Liger (CuTe) linear cross entropy, 4,096 x 4,096 x 128,256, bf16",
            card="h200",
            ms=18.06,
            source=QUACK,
            phases=linear_cross_entropy(4096, 4096, 128256),
        ),
    )
    return sorted(found, key=lambda each: -max(each.ratio, 1 / each.ratio))


def sensitivity(case: Published) -> dict[str, float]:
    """Return predicted / published with each constant's published alternatives, by "name value"."""
    found = {}
    for name, constant in CONSTANTS.items():
        for values in constant.alternatives:
            if case.card in values and values[case.card] != constant.values[case.card]:
                rates = rates_of(case.card, **{name: values[case.card]})
                found[f"{name} {values[case.card]:g}"] = predict(case.phases, rates).ms / case.ms
    return found
