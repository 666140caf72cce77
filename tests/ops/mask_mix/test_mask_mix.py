"""mask_mix against float64 arithmetic, torchvision, and itself on other threads and vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD, mask_mix, reference
from tests.shared.cuda.emulator import emulated
from tests.shared.ops.cpu_capability import run_held_to
from tests.shared.ops.mask_mix_cases import CASES, DTYPES, make
from tests.shared.tolerance import assert_as_accurate

every_kernel = pytest.mark.usefixtures("kernel")


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
    arguments = views, torch.zeros(1, 1, 1, dtype=torch.uint8), torch.tensor([[0]])
    ours = mask_mix(*arguments)
    truth = reference.mask_mix(*arguments, dtype=torch.float64, compute_dtype=torch.float64)
    ulp = torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours.double() - truth).abs().max() <= ulp
    assert torch.equal(mask_mix(*arguments, dtype=torch.bfloat16), ours.bfloat16())


def test_constants_are_timms() -> None:
    constants = pytest.importorskip("timm.data.constants")
    assert IMAGENET_MEAN == constants.IMAGENET_DEFAULT_MEAN
    assert IMAGENET_STD == constants.IMAGENET_DEFAULT_STD


@every_kernel
@pytest.mark.parametrize("num_members", [1, 2, 3])
def test_picture_of_one_view_normalises_it_as_torchvision(num_members: int) -> None:
    from torchvision.transforms.v2 import functional as vision  # a GPU's tests do without it

    views, choice, _ = make(CASES["patch 16"])
    members = torch.tensor([[3], [0]]).repeat(1, num_members)
    expected = vision.normalize(
        vision.to_dtype(views[members[:, 0]], torch.float32, scale=True),
        list(IMAGENET_MEAN),
        list(IMAGENET_STD),
    )
    mixed = mask_mix(views, choice.clamp(max=num_members - 1), members)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)


@every_kernel
@pytest.mark.parametrize("num_members", [1, 2, 3, 4])
def test_a_cell_shows_the_member_of_its_column(num_members: int) -> None:
    """Cell by cell in plain Python, of views of one byte each."""
    views = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 3, 4, 6)
    columns = [[0, 1, 2], [3, 1, 0]]
    choice = torch.tensor([columns], dtype=torch.uint8).clamp(max=num_members - 1)
    members = [3, 1, 2, 0][:num_members]
    mixed = mask_mix(views, choice, torch.tensor([members]), mean=(0.0,) * 3, std=(1.0,) * 3)
    shades = [0.0, 0.2, 0.4, 1.0]
    for y in range(4):
        for x in range(6):
            view = members[min(columns[y // 2][x // 2], num_members - 1)]
            assert mixed[0, :, y, x].tolist() == pytest.approx([shades[view]] * 3)


@every_kernel
def test_two_members_give_the_bits_of_the_same_two_among_more() -> None:
    views, choice, members = make(CASES["several tasks a thread"])
    among = torch.stack([members[:, 0], members[:, 1], members[:, 0], members[:, 1]], 1)
    other = torch.randint(2, choice.shape, generator=torch.Generator().manual_seed(1))
    same = choice + 2 * other.to(torch.uint8)
    assert torch.equal(mask_mix(views, same, among), mask_mix(views, choice, members))


@every_kernel
@pytest.mark.parametrize("case", ["patch 16", "three members"])
def test_unaligned_views(case: str) -> None:
    views, choice, members = make(CASES[case])
    buffer = torch.empty(views.numel() + 1, dtype=torch.uint8)
    shifted = buffer[1:].view_as(views).copy_(views)
    assert torch.equal(mask_mix(shifted, choice, members), mask_mix(views, choice, members))


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
@pytest.mark.parametrize("num_members", [2, 3])
def test_threads_change_no_bit(num_members: int, dtype: torch.dtype) -> None:
    inputs = make(CASES["several tasks a thread"]._replace(members=num_members))
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
from m3i_fast.ops import mask_mix
from tests.shared.ops.mask_mix_cases import CASES, DTYPES, make
digest = hashlib.sha256()
for case in CASES.values():
    for dtype in DTYPES:
        mixed = mask_mix(*make(case), dtype=dtype)
        digest.update(mixed.flatten().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_change_no_bit() -> None:
    """Baseline, AVX2 and the best of this machine agree."""
    capabilities = ("default", "avx2", "avx512")
    digests = {run_held_to(capability, _DIGEST) for capability in capabilities}
    assert len(digests) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_cuda_gives_the_bits_of_the_cpu(
    inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    on_cpu = mask_mix(*inputs, dtype=dtype)
    with emulated("mask_mix"):
        assert torch.equal(mask_mix(*inputs, dtype=dtype), on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_gives_the_bits_of_the_cpu(
    inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    on_cuda = mask_mix(*(tensor.cuda() for tensor in inputs), dtype=dtype)
    assert torch.equal(on_cuda.cpu(), mask_mix(*inputs, dtype=dtype))
