"""Calls of mask_mix: sizes, and views, choices and members of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    """Sizes of one call: B views of H x W pixels to P pictures with h x w cells of K views."""

    views: int
    pictures: int
    height: int
    width: int
    rows: int
    columns: int
    members: int = 2


CASES = {
    "patch 16": Case(4, 2, 64, 64, 4, 4),
    "patch 14": Case(3, 2, 28, 42, 2, 3),
    "patch 8, non-square": Case(3, 3, 24, 40, 3, 5),
    "more pictures than views": Case(2, 7, 32, 32, 2, 2),
    "width 17: one vector and one pixel": Case(2, 2, 4, 17, 2, 1),
    "odd everything": Case(3, 2, 15, 33, 5, 11),
    "a cell a pixel": Case(2, 2, 5, 7, 5, 7),
    "one cell": Case(2, 2, 19, 23, 1, 1),
    "size 1": Case(1, 1, 1, 1, 1, 1),
    "no pictures": Case(2, 0, 16, 16, 2, 2),
    "no views": Case(0, 0, 16, 16, 2, 2),
    "several tasks a thread": Case(8, 16, 96, 96, 6, 6),
    "one member": Case(3, 4, 32, 32, 2, 2, members=1),
    "one member, one cell": Case(3, 2, 19, 23, 1, 1, members=1),
    "three members": Case(5, 3, 48, 64, 3, 4, members=3),
    "three members, odd everything": Case(3, 2, 15, 33, 5, 11, members=3),
    "four members, patch 14": Case(4, 4, 28, 56, 2, 4, members=4),
    "most members": Case(7, 2, 18, 36, 18, 18, members=255),
}


def make(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(
        256, (case.views, 3, case.height, case.width), dtype=torch.uint8, generator=generator
    )
    cells = case.pictures, case.rows, case.columns
    choice = torch.randint(case.members, cells, dtype=torch.uint8, generator=generator)
    members = torch.randint(max(1, case.views), (case.pictures, case.members), generator=generator)
    return views.to(device), choice.to(device), members.to(device)
