"""boltzmann by warpgroups, on compute capability 9.0: instructions, and results as emulated."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.ops import boltzmann
from tests.cuda.boltzmann.source import limit_blocks, shrink
from tests.shared.cuda import emulator
from tests.shared.cuda.nvcc import ROOT, compile_options, instructions, run_nvcc
from tests.shared.ops.boltzmann_kernel_cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    MODES,
    Call,
    assert_all_as_accurate,
    make,
    true_grads,
    true_maxima,
    true_sums,
)
from tests.shared.tolerance import assert_as_accurate

NAMES = "rows cols grad_z_hat grad_z grad_scale grad_bias values"


def test_policy(tmp_path: Path) -> None:
    source = Path(__file__).with_name("hopper_policy.cu")
    run_nvcc(*compile_options("90a"), "-c", source, "-o", tmp_path / "policy.o")


def test_the_build_takes_warpgroups_where_it_has_code_for_90a() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    (default,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES (.*)\)", text)
    (pattern,) = re.findall(
        r'if\(CMAKE_CUDA_ARCHITECTURES MATCHES "(.*)"\)\n'
        r" *target_compile_definitions\(_C_cuda PRIVATE M3I_SM90A\)",
        text,
    )
    for architectures in (default.replace(" ", ";"), "90a", "80;90a"):
        assert re.search(pattern, architectures), architectures
    for architectures in ("80", "90", "80;90-real", "100a"):
        assert not re.search(pattern, architectures), architectures


# ---- Instructions --------------------------------------------------------------------------------


SASS = Path(__file__).with_name("hopper_sass.cu")


def code_of(stem: str, folder: Path) -> list[str]:
    kernels = instructions(SASS, "90a", folder)
    (code,) = (code for name, code in kernels.items() if f"boltzmann_{stem}_hopper_kernelI" in name)
    return code


@pytest.mark.parametrize(("stem", "layouts"), [("sums", 1), ("grads", 3)])
def test_tensor_copies_feed_warpgroup_products(
    stem: str, layouts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Four products and four copies a stage, for each layout of the operands; nothing else does it.

    A wait for all products (`DEPBAR`) stands after the loop, one for all but the last inside it.
    """
    code = Counter(code_of(stem, tmp_path_factory.getbasetemp()))
    assert code["HGMMA.64x256x16.F32.BF16"] == 4 * layouts
    assert code["WARPGROUP.DEPBAR.LE"] == 2 * layouts
    assert code["UTMALDG.2D"] == code["UTMALDG.2D.MULTICAST"] == 2 * layouts
    assert code["USETMAXREG.TRY_ALLOC.CTAPOOL"] == code["USETMAXREG.DEALLOC.CTAPOOL"] == 1
    assert not [op for op in code if op.startswith(("HMMA", "LDGSTS", "LDSM", "STL", "LDL"))]


def test_a_half_tile_is_summed_in_one_pass(tmp_path_factory: pytest.TempPathFactory) -> None:
    """At most 1,000 instructions with two groups of columns that have positives, over rows alone.

    Each element has an exponential in the pass, and one where its group of columns has positives.
    Row sums alone leave out what folds columns.
    """
    code = code_of("sums", tmp_path_factory.getbasetemp())
    exponentials = [i for i, op in enumerate(code) if op == "MUFU.EX2"]
    assert len(exponentials) == 128 + 128
    barriers = [i for i, op in enumerate(code) if op.startswith("BAR.")]
    end = min(i for i in barriers if i > exponentials[-1])
    summed = code[exponentials[128] : end]
    shuffles = Counter(summed)["SHFL.BFLY"]
    assert shuffles == 4 * 14 + 2 * 2, "columns, then rows"
    assert not [op for op in summed if op.startswith(("LDL", "STL"))]
    ids = [op for op in summed if op.startswith("ISETP.EQ")]
    assert len(ids) <= 1, "ids are compared: one tells which lane adds to a row's sum"
    group = (exponentials[124] - exponentials[0]) // 31  # its test, its rows and its columns
    assert group <= 100 and len(summed) <= 800
    tests = 2 * 32
    assert len(summed) + tests + group <= 1000


# ---- Results -------------------------------------------------------------------------------------


def results(call: Call) -> list[Tensor]:
    return [*call.sums(), *call.grads()]


def assert_right(call: Call) -> None:
    torchs = [*true_sums(call, FP32), *true_grads(call, FP32, rounded=True)]
    truth = [*true_sums(call), *true_grads(call)]
    assert_all_as_accurate(results(call), torchs, truth, call, NAMES)


# N, M, D, the scale: a single element, less than a tile, one tile, a row and a column more, and
# several tiles. The logits of a few features reach further.
SHAPES = (
    (1, 1, 8, 4.0),
    (2, 5, 24, 14.3),
    (64, 256, 64, 14.3),
    (129, 257, 136, 14.3),
    (150, 513, 72, 14.3),
    (130, 20, 264, 14.3),
)


@pytest.mark.parametrize("mode", MODES)
def test_results(mode: str) -> None:
    """Exact sums and those of the sigmoid are made as on compute capability 8.0."""
    with emulator.emulated("boltzmann", architecture=90):
        for i, (*shape, scale) in enumerate(SHAPES):
            for labels in (False, True):
                dtype = (BF16, FP16)[(i + labels) % 2]
                assert_right(make(tuple(shape), dtype, mode, labels, scale))


@pytest.mark.parametrize("architecture", [80, 90])
def test_tiles_without_positives_and_ignored_rows(architecture: int) -> None:
    """As nearly all are, and none above: the halves of rows below 256, right of their columns."""
    with emulator.emulated("boltzmann", architecture=architecture):
        for mode in MODES:
            call = make((300, 600, 72), BF16, mode, labels=False)
            ids = torch.arange(300, dtype=torch.int32)
            call = replace(call, row_ids=ids, bias=call.bias.clamp_min(-4))
            if mode == "exact":
                row_max, col_max = (most.to(FP32) for most in true_maxima(call))
                call = replace(call, row_shift=row_max, col_shift=col_max)
            assert_right(call)


def test_both_architectures_agree() -> None:
    """All but the order in which sums are added is the same."""
    call = make((129, 257, 136), BF16, "shared", labels=True)
    ours = {}
    for architecture in (80, 90):
        with emulator.emulated("boltzmann", architecture=architecture):
            ours[architecture] = results(call)
    assert not torch.equal(ours[80][0], ours[90][0]), "the same kernel"
    for old, new in zip(ours[80], ours[90], strict=True):
        if old.numel():
            # G is rounded: one that lies between two numbers may go to either
            torch.testing.assert_close(new, old, rtol=1e-5, atol=2e-3 * float(old.abs().amax()))


def clip_loss(z_hat: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(z.dtype) * z_hat @ z.T
    here = torch.arange(len(z))
    return (F.cross_entropy(logits, here) + F.cross_entropy(logits.T, here)) / 2


def test_loss_and_gradients_beside_torchs_bfloat16_graph() -> None:
    rng = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(200, 72, generator=rng), dim=1) for _ in range(2)]
    features[0] = F.normalize(features[0] + features[1], dim=1)

    def differentiate(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        z_hat, z = (rows.to(BF16).to(dtype).requires_grad_() for rows in features)
        scale = torch.tensor(14.3, dtype=FP64 if dtype == FP64 else FP32, requires_grad=True)
        value = loss(z_hat, z, scale)
        return [value.to(scale.dtype), *torch.autograd.grad(value, (z_hat, z, scale))]

    with emulator.emulated("boltzmann", architecture=90):
        ours = differentiate(boltzmann, BF16)
    torchs, truth = differentiate(clip_loss, BF16), differentiate(clip_loss, FP64)
    for our, its, true in zip(ours, torchs, truth, strict=True):
        assert_as_accurate(our.detach(), its.detach(), true.detach(), times=2.0)


def test_what_tensor_copies_cannot_take_goes_the_old_way() -> None:
    """Rows of 20 bytes, and features that begin 8 bytes after a multiple of 16."""
    odd = make((33, 40, 10), BF16, "shared", labels=False)
    even = make((33, 40, 16), BF16, "shared", labels=False)
    shifted = torch.cat([even.z.new_zeros(4), even.z.flatten()])[4:].view_as(even.z)
    assert shifted.data_ptr() % 16 == 8 and shifted.is_contiguous()
    moved = replace(even, z=shifted)
    with emulator.emulated("boltzmann", architecture=90):
        for call in (odd, moved):
            assert_right(call)
        new = results(even)
        assert any(not torch.equal(a, b) for a, b in zip(new, results(moved), strict=True))


def test_what_nobody_asked_for_is_not_written() -> None:
    call = make((70, 300, 72), BF16, "shared", labels=False)
    with emulator.emulated("boltzmann", architecture=90):
        rows, columns = call.sums(symmetric=False)
        assert columns.numel() == 0 and torch.equal(rows, call.sums()[0])
        of_all = call.grads()
        for wanted in ((True, False, False), (False, True, True), (False, False, False)):
            grads = call.grads(wanted)
            asked = (*wanted[:2], True, wanted[2])
            for grad, of_them, is_asked in zip(grads[:4], of_all[:4], asked, strict=True):
                assert torch.equal(grad, of_them) if is_asked else grad.numel() == 0


def test_blocks_and_tiles_follow_one_another(tmp_path: Path) -> None:
    """Blocks of C of 2 x 1 tiles, all by one cluster: it adds them up and the ring goes round.

    With the same bits as by four clusters that take turns, ticket by ticket. Patches of the first
    shape have 3 x 1 tiles; those of the second one 2 x 2, as in a call of 16,384 squared.
    """
    shapes = (530, 290, 328), (300, 800, 72)
    calls = [make(shape, BF16, mode, True) for shape in shapes for mode in ("shared", "sigmoid")]
    ours = []
    for clusters in (1, 4):
        folder = tmp_path / str(clusters) / "boltzmann"
        shutil.copytree(emulator.CUDA / "boltzmann", folder)
        shrink(folder)
        limit_blocks(folder, clusters)
        with (
            emulator.emulated("boltzmann", folder=folder.parent, architecture=90),
            emulator.clusters_at_once(clusters),
        ):
            for call in calls:
                assert_right(call)
            ours.append([result for call in calls for result in results(call)])
    for first, second in zip(*ours, strict=True):
        assert torch.equal(first, second)
