"""mask_mix names what is wrong with its input; on CUDA what only the device sees is a trap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3i_fast.ops import mask_mix
from tests.shared.cuda.emulator import emulated

_VIEWS = torch.zeros(3, 3, 8, 12, dtype=torch.uint8)
_CHOICE = torch.zeros(2, 2, 3, dtype=torch.uint8)
_MEMBERS = torch.tensor([[0, 1], [2, 0]])
_THIRD = torch.tensor([[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 2, 0]]], dtype=torch.uint8)

# name: (arguments that differ from the right ones, what the message must say)
WRONG = {
    "float views": ({"views": _VIEWS.float()}, r"views: expected dtype \S*uint8, got \S*float32"),
    "bool choice": ({"choice": _CHOICE.bool()}, r"choice: expected dtype \S*uint8, got \S*bool"),
    "int32 members": (
        {"members": _MEMBERS.int()},
        r"members: expected dtype \S*int64, got \S*int32",
    ),
    "one channel": ({"views": _VIEWS[:, :1].contiguous()}, r"views: .*\[\*, 3, .* got \[3, 1, 8"),
    "three dimensions": ({"views": _VIEWS[0]}, r"views: expected shape .* got \[3, 8, 12\]"),
    "flat members": ({"members": _MEMBERS[0]}, r"members: expected shape \[\*, \*\], got \[2\]"),
    "no members": ({"members": _MEMBERS[:, :0]}, r"members: expected 1 to 255 columns, got 0"),
    "256 members": (
        {"members": _MEMBERS.new_zeros(2, 256)},
        r"members: expected 1 to 255 columns, got 256",
    ),
    "a choice short": (
        {"choice": _CHOICE[:1]},
        r"choice: expected shape \[2, \*, \*\], got \[1, 2, 3\]",
    ),
    "flat choice": (
        {"choice": _CHOICE[:, 0]},
        r"choice: expected shape \[2, \*, \*\], got \[2, 3\]",
    ),
    "ragged rows": (
        {"choice": _CHOICE.new_zeros(2, 3, 3)},
        r"choice: expected a grid that divides views of 8 x 12 pixels, got 3 x 3 cells",
    ),
    "ragged columns": ({"choice": _CHOICE.new_zeros(2, 2, 5)}, r"8 x 12 pixels, got 2 x 5 cells"),
    "no cells": ({"choice": _CHOICE.new_zeros(2, 0, 3)}, r"8 x 12 pixels, got 0 x 3 cells"),
    "half": ({"dtype": torch.float16}, r"dtype: expected float32 or bfloat16, got \S*float16"),
}

# Not seen by the fake: they depend on values or strides.
WRONG_WHEN_RUN = {
    "choice past the members": (
        {"choice": _THIRD},
        r"choice\[1, 1, 1\]: expected a column of members, 0 <= column < 2, got 2",
    ),
    "choice of a second member of one": (
        {"choice": _THIRD // 2, "members": _MEMBERS[:, :1].contiguous()},
        r"choice\[1, 1, 1\]: expected a column of members, 0 <= column < 1, got 1",
    ),
    "member past the end": (
        {"members": torch.tensor([[0, 1], [3, 0]])},
        r"members\[1, 0\]: expected a row of views, 0 <= row < 3, got 3",
    ),
    "negative member": (
        {"members": torch.tensor([[0, 1, -1], [0, 0, 0]])},
        r"members\[0, 2\]: .* got -1",
    ),
    "strided views": (
        {"views": _VIEWS.transpose(2, 3)},
        r"views: expected a contiguous tensor, got strides \[288, 96, 1, 12\]",
    ),
    "strided choice": ({"choice": _CHOICE.repeat(1, 1, 2)[..., ::2]}, r"choice: .*strides"),
    "strided members": ({"members": _MEMBERS.t()}, r"members: expected a contiguous tensor"),
    "two means": ({"mean": (0.5, 0.5)}, r"mean: expected 3 values, got 2"),
    "two deviations": ({"std": (0.5, 0.5)}, r"std: expected 3 values, got 2"),
    "no deviation": ({"std": (0.5, 0.0, 0.5)}, r"std: expected positive values, got 0"),
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    {**WRONG, **WRONG_WHEN_RUN}.values(),
    ids={**WRONG, **WRONG_WHEN_RUN}.keys(),
)
def test_wrong_input_is_named(wrong: dict[str, object], message: str) -> None:
    arguments = {"views": _VIEWS, "choice": _CHOICE, "members": _MEMBERS}
    with pytest.raises(RuntimeError, match=message):
        mask_mix(**{**arguments, **wrong})


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_fake_names_wrong_input_too(wrong: dict[str, object], message: str) -> None:
    arguments = {"views": _VIEWS, "choice": _CHOICE, "members": _MEMBERS, **wrong}
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        mask_mix(**meta)


def test_right_input_of_the_wrong_ones() -> None:
    assert mask_mix(_VIEWS, _CHOICE, _MEMBERS).shape == (2, 3, 8, 12)


@pytest.mark.cuda
@pytest.mark.parametrize("row", [-1, 3])
def test_cuda_stops_at_a_member_outside_views(row: int) -> None:
    members = torch.tensor([[0, 1], [row, 0]])
    with (
        emulated("mask_mix"),
        pytest.raises(RuntimeError, match=r"(?s)__trap\(\).*mask_mix_kernel"),
    ):
        mask_mix(_VIEWS, _CHOICE, members)


@pytest.mark.cuda
@pytest.mark.parametrize("num_members", [1, 2])
def test_cuda_stops_at_a_choice_past_the_members(num_members: int) -> None:
    with (
        emulated("mask_mix"),
        pytest.raises(RuntimeError, match=r"(?s)__trap\(\).*mask_mix_kernel"),
    ):
        mask_mix(_VIEWS, _THIRD, _MEMBERS[:, :num_members].contiguous())
