"""mask_mix against float64 arithmetic, torchvision, and itself on other threads and vectors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD, mask_mix, reference
from tests.cuda.emulator import emulated
from tests.tolerance import assert_as_accurate

every_kernel = pytest.mark.usefixtures("kernel")

DTYPES = (torch.float32, torch.bfloat16)


class Case(NamedTuple):
    """Sizes of one call: B views of H x W pixels to P pictures with h x w cells."""

    views: int
    pairs: int
    height: int
    width: int
    rows: int
    columns: int


CASES = {
    "patch 16": Case(4, 2, 64, 64, 4, 4),
    "patch 14": Case(3, 2, 28, 42, 2, 3),
    "patch 8, non-square": Case(3, 3, 24, 40, 3, 5),
    "more pairs than views": Case(2, 7, 32, 32, 2, 2),
    "width 17: one vector and one pixel": Case(2, 2, 4, 17, 2, 1),
    "odd everything": Case(3, 2, 15, 33, 5, 11),
    "a cell a pixel": Case(2, 2, 5, 7, 5, 7),
    "one cell": Case(2, 2, 19, 23, 1, 1),
    "size 1": Case(1, 1, 1, 1, 1, 1),
    "no pairs": Case(2, 0, 16, 16, 2, 2),
    "no views": Case(0, 0, 16, 16, 2, 2),
    "several tasks a thread": Case(8, 16, 96, 96, 6, 6),
}


def make(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(
        256, (case.views, 3, case.height, case.width), dtype=torch.uint8, generator=generator
    )
    mask = torch.rand(case.pairs, case.rows, case.columns, generator=generator) < 0.5
    pairs = torch.randint(max(1, case.views), (case.pairs, 2), generator=generator)
    return views.to(device), mask.to(device), pairs.to(device)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def inputs(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    return make(request.param)


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_torch(inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    truth = reference.mask_mix(*inputs, dtype=torch.float64, compute_dtype=torch.float64)
    assert_as_accurate(
        mask_mix(*inputs, dtype=dtype), reference.mask_mix(*inputs, dtype=dtype), truth
    )


@every_kernel
def test_every_byte_rounds_at_most_one_ulp_off() -> None:
    """All 256 pixels of all channels, against the docstring's bound; bf16 is float32 rounded."""
    views = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    arguments = views, torch.ones(1, 1, 1, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64)
    ours = mask_mix(*arguments)
    truth = reference.mask_mix(*arguments, dtype=torch.float64, compute_dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= ulp
    assert torch.equal(mask_mix(*arguments, dtype=torch.bfloat16), ours.bfloat16())


@every_kernel
def test_pair_of_one_view_normalises_it_as_torchvision() -> None:
    views, mask, _ = make(CASES["patch 16"])
    pairs = torch.tensor([[3, 3], [0, 0]])
    expected = vision.normalize(
        vision.to_dtype(views[pairs[:, 0]], torch.float32, scale=True),
        list(IMAGENET_MEAN),
        list(IMAGENET_STD),
    )
    torch.testing.assert_close(mask_mix(views, mask, pairs), expected, rtol=0, atol=1e-6)


@every_kernel
def test_mask_chooses_the_first_view_where_true() -> None:
    views = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 6)
    mask = torch.tensor([[[True, False, False], [False, True, True]]])
    mixed = mask_mix(
        views.contiguous(), mask, torch.tensor([[1, 0]]), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    expected = expected.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    assert torch.equal(mixed, expected.expand(1, 3, 4, 6))


@every_kernel
def test_unaligned_views() -> None:
    views, mask, pairs = make(CASES["patch 16"])
    buffer = torch.empty(views.numel() + 1, dtype=torch.uint8)
    shifted = buffer[1:].view_as(views).copy_(views)
    assert torch.equal(mask_mix(shifted, mask, pairs), mask_mix(views, mask, pairs))


@every_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    torch.library.opcheck(
        torch.ops.m3i.mask_mix.default,
        (*inputs, list(IMAGENET_MEAN), list(IMAGENET_STD), dtype),
    )


@every_kernel
def test_compiles_to_one_graph(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *arguments: mask_mix(*arguments) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*inputs), mask_mix(*inputs) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    inputs = make(CASES["several tasks a thread"])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(mask_mix(*inputs, dtype=dtype))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results[1:])


_DIGEST = """
import hashlib
import torch
from tests.ops.test_mask_mix import CASES, DTYPES, make, mask_mix
digest = hashlib.sha256()
for case in CASES.values():
    for dtype in DTYPES:
        mixed = mask_mix(*make(case), dtype=dtype)
        digest.update(mixed.flatten().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_change_no_bit() -> None:
    """torch's own switch lowers ours: baseline, AVX2 and the best of this machine agree."""
    root = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
            cwd=root,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for capability in ("default", "avx2", "avx512")
    }
    assert len(digests) == 1


_VIEWS = torch.zeros(3, 3, 8, 12, dtype=torch.uint8)
_MASK = torch.ones(2, 2, 3, dtype=torch.bool)
_PAIRS = torch.tensor([[0, 1], [2, 0]])

# name: (arguments that differ from the right ones, what the message must say)
WRONG = {
    "float views": ({"views": _VIEWS.float()}, r"views: expected dtype \S*uint8, got \S*float32"),
    "byte mask": ({"mask": _MASK.byte()}, r"mask: expected dtype \S*bool, got \S*uint8"),
    "int32 pairs": ({"pairs": _PAIRS.int()}, r"pairs: expected dtype \S*int64, got \S*int32"),
    "one channel": ({"views": _VIEWS[:, :1].contiguous()}, r"views: .*\[\*, 3, .* got \[3, 1, 8"),
    "three dimensions": ({"views": _VIEWS[0]}, r"views: expected shape .* got \[3, 8, 12\]"),
    "triples": (
        {"pairs": _PAIRS.new_zeros(2, 3)},
        r"pairs: expected shape \[\*, 2\], got \[2, 3\]",
    ),
    "a mask short": ({"mask": _MASK[:1]}, r"mask: expected shape \[2, \*, \*\], got \[1, 2, 3\]"),
    "flat mask": ({"mask": _MASK[:, 0]}, r"mask: expected shape \[2, \*, \*\], got \[2, 3\]"),
    "ragged rows": (
        {"mask": _MASK.new_ones(2, 3, 3)},
        r"mask: expected a grid that divides views of 8 x 12 pixels, got 3 x 3 cells",
    ),
    "ragged columns": ({"mask": _MASK.new_ones(2, 2, 5)}, r"8 x 12 pixels, got 2 x 5 cells"),
    "no cells": ({"mask": _MASK.new_ones(2, 0, 3)}, r"8 x 12 pixels, got 0 x 3 cells"),
    "half": ({"dtype": torch.float16}, r"dtype: expected float32 or bfloat16, got \S*float16"),
}

# Not seen by the fake: they depend on values or strides.
WRONG_WHEN_RUN = {
    "pair past the end": (
        {"pairs": torch.tensor([[0, 1], [3, 0]])},
        r"pairs\[1, 0\]: expected a row of views, 0 <= row < 3, got 3",
    ),
    "negative pair": ({"pairs": torch.tensor([[0, -1], [0, 0]])}, r"pairs\[0, 1\]: .* got -1"),
    "strided views": (
        {"views": _VIEWS.transpose(2, 3)},
        r"views: expected a contiguous tensor, got strides \[288, 96, 1, 12\]",
    ),
    "strided mask": ({"mask": torch.ones(2, 2, 6, dtype=torch.bool)[..., ::2]}, r"mask: .*strides"),
    "strided pairs": ({"pairs": _PAIRS.t()}, r"pairs: expected a contiguous tensor"),
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
    arguments = {"views": _VIEWS, "mask": _MASK, "pairs": _PAIRS}
    with pytest.raises(RuntimeError, match=message):
        mask_mix(**{**arguments, **wrong})


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_fake_names_wrong_input_too(wrong: dict[str, object], message: str) -> None:
    arguments = {"views": _VIEWS, "mask": _MASK, "pairs": _PAIRS, **wrong}
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        mask_mix(**meta)


def test_right_input_of_the_wrong_ones() -> None:
    assert mask_mix(_VIEWS, _MASK, _PAIRS).shape == (2, 3, 8, 12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_cuda_gives_the_bits_of_the_cpu(
    inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    on_cpu = mask_mix(*inputs, dtype=dtype)
    with emulated("mask_mix"):
        assert torch.equal(mask_mix(*inputs, dtype=dtype), on_cpu)


@pytest.mark.parametrize("row", [-1, 3])
def test_cuda_stops_at_a_pair_outside_views(row: int) -> None:
    pairs = torch.tensor([[0, 1], [row, 0]])
    with (
        emulated("mask_mix"),
        pytest.raises(RuntimeError, match=r"(?s)__trap\(\).*mask_mix_kernel"),
    ):
        mask_mix(_VIEWS, _MASK, pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_gives_the_bits_of_the_cpu(
    inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    on_cuda = mask_mix(*(tensor.cuda() for tensor in inputs), dtype=dtype)
    assert torch.equal(on_cuda.cpu(), mask_mix(*inputs, dtype=dtype))
