"""What gaussian, mask_mix and views ask of a card, in closed form of a call's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from m3i_fast.config.data import ViewConfig
from m3i_fast.costs.kernels.instructions import instructions_of
from m3i_fast.costs.kernels.model import LINE, SECTOR, Phase
from m3i_fast.costs.view_cost import view_work

GAUSSIAN_BLOCKS = 1056  # at most, of 8 rows at once
MASK_MIX_PIXELS = 16  # of a thread


def gaussian_sectors(rows: int, width: int, *, backward: bool) -> tuple[float, float]:
    """Return the sectors that the bf16 kernel with normalised targets reads and writes."""
    image = rows * width * 2 / SECTOR
    if backward:  # both inputs; mean, rstd and the gradient of the value, a sector a row each
        return 2 * image + 3 * rows, image
    return 2 * image, 2 * rows + min(GAUSSIAN_BLOCKS, ceil(rows / 8))


def gaussian(rows: int, width: int, *, backward: bool) -> tuple[Phase, ...]:
    """Return the phases of a pass over [rows, width] in bf16, targets normalised."""
    name = "gaussian_bwd_kernel" if backward else "gaussian_kernel"
    count = instructions_of("gaussian", name)
    read, written = gaussian_sectors(rows, width, backward=backward)
    accesses = ceil(width / 256)  # of a warp: 8 elements a lane
    kernel = Phase(
        name=name,
        memory_bytes=(6 if backward else 4) * rows * width,
        read_sectors=read,
        write_sectors=written,
        wavefronts=(read + written) * SECTOR / LINE,
        instructions=rows * (count["row"] + accesses * count["access"]),
    )
    return (kernel,) if backward else (kernel, Phase(name="gaussian_value_kernel"))


def mask_mix_sectors(pictures: int, size: int, cell: int) -> tuple[float, float]:
    """Return the sectors of pixels that are read, of bytes, and those written in bf16.

    cell: pixels of a cell's side; neighbouring cells are taken from other views.
    """
    pixels = pictures * 3 * size**2
    return pixels / min(SECTOR, cell), 2 * pixels / SECTOR


def mask_mix(pictures: int, size: int, cell: int) -> tuple[Phase, ...]:
    """Return the phase that mixes square pictures of bytes into bf16."""
    pixels = pictures * size**2
    read, written = mask_mix_sectors(pictures, size, cell)
    warps = pixels / MASK_MIX_PIXELS / 32
    return (
        Phase(
            name="mask_mix_kernel",
            memory_bytes=9 * pixels,
            read_sectors=read,
            write_sectors=written,
            wavefronts=(read + written) * SECTOR / LINE,
            instructions=warps * instructions_of("mask_mix", "mask_mix_kernel")["warp"],
        ),
    )


def views(
    groups: Sequence[ViewConfig], height: int, width: int, pictures: int
) -> tuple[Phase, ...]:
    """Return the phase that cuts the views of decoded pictures.

    Bytes, sectors and loads of shared memory as m3i_fast/costs/view_cost.py has them; instructions
    are not counted, of which colours and weights take many.
    """
    work = view_work(groups, height, width)
    return (
        Phase(
            name="views_kernel",
            memory_bytes=pictures * work.memory,
            read_sectors=pictures * work.cache / SECTOR,
            wavefronts=pictures * work.loads / 32,
        ),
    )
