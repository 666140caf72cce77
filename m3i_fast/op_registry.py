"""The one list of ops: what the doctor, `make gpu`, benchmarks, profiles and tables know of each.

An op's folder in cuda/, its Python file, its plain-torch reference, its test, its benchmark and its
rows in the ledger share its name. At module level only the standard library, and beside ops/, which
loads torch: `m3i-fast bench` lists names in a moment, `make gpu` runs this file by its path before
the package is built, and a process of `m3i-fast bench compare` beside another version of the ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuBenchmark:
    """How `make gpu` runs a benchmark."""

    worth: int
    """The order in which benchmarks share the time that there is: 1 runs first."""
    limit_s: float
    """Seconds that it may take at most."""
    small: tuple[str, ...] = ()
    """Arguments that make it small, for a machine without a GPU."""
    skipped_small: str = ""
    """Why a machine without a GPU leaves it out; empty: it does not."""
    needs: tuple[str, ...] = ()
    """Packages that it needs, by the names of scripts/gpu/machine.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpSpec:
    """One op, by the name that all of its files share."""

    name: str
    title: str
    """What pages call it."""
    is_right: Callable[[str], bool]
    """Run the op on a small input on `cpu` or `cuda`; False where the result is wrong."""
    work: Callable[[], Callable[[], object]]
    """Prepare a call on the CPU, whose time `m3i-fast bench compare` compares between versions."""
    measures: str
    """What its benchmark measures, in a line."""
    gpu: GpuBenchmark
    """How `make gpu` runs its benchmark."""
    sanitizer: str
    """The GPU test that `make gpu` runs under compute-sanitizer: small inputs, since a sanitizer
    makes them slower by one or two orders of magnitude."""
    benchmark: str = ""
    """The benchmark's module below benchmarks/; empty: ops.<name>."""
    kernels: str = ""
    """Expression for more names of kernels and operators of a profile that are the op's, beside
    those that begin with its own; empty: there are none."""

    @property
    def module(self) -> str:
        """Return the benchmark's module below benchmarks/."""
        return self.benchmark or f"ops.{self.name}"

    @property
    def budget(self) -> str:
        """Return the file with the registers and shared memory of its kernels, from the root."""
        return f"cuda/{self.name}/budget.json"


# ---- mask_mix ------------------------------------------------------------------------------------


def _mask_mix_is_right(device: str) -> bool:
    """Two views in quarters, each pixel that of the view which its cell chose."""
    import torch

    from m3i_fast.ops import mask_mix

    views = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8, device=device).reshape(2, 3, 4, 4)
    choice = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.uint8, device=device)
    members = torch.tensor([[0, 1]], device=device)
    mixed = mask_mix(views, choice, members, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    cells = choice.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    expected = torch.where(cells == 0, views[:1], views[1:]).float() / 255
    return torch.allclose(mixed, expected)


def _mask_mix_work() -> Callable[[], object]:
    """64 pictures mixed of two views of 64 pixels each, fp32."""
    import torch

    from m3i_fast.ops import mask_mix

    rng = torch.Generator().manual_seed(0)
    views = torch.randint(256, (64, 3, 64, 64), dtype=torch.uint8, generator=rng)
    choice = torch.randint(2, (64, 8, 8), dtype=torch.uint8, generator=rng)
    members = torch.randint(64, (64, 2), generator=rng)
    return lambda: mask_mix(views, choice, members, dtype=torch.float32)


# ---- dcnv3 ---------------------------------------------------------------------------------------


def _dcnv3_is_right(device: str) -> bool:
    """Every pixel takes half of what lies half a pixel to its right."""
    import torch

    from m3i_fast.ops import dcnv3

    x = torch.arange(8.0, device=device).reshape(1, 1, 8, 1)
    offset = torch.tensor([0.5, 0.0], device=device).repeat(1, 1, 8, 1)
    mask = torch.full_like(x, 0.5)
    out = dcnv3(x, offset, mask, kernel_size=1, stride=1, padding=0, dilation=1, groups=1)
    expected = [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 1.75]  # beyond the last pixel lie zeros
    return out.flatten().tolist() == expected


def _dcnv3_work() -> Callable[[], object]:
    """InternImage-T's layer of 14 x 14 x 256, batch 4, forward, fp32."""
    import torch

    from m3i_fast.ops import dcnv3

    rng = torch.Generator().manual_seed(0)
    groups, points = 16, 9
    sizes = 256, groups * points * 2, groups * points
    x, offset, mask = (torch.randn(4, 14, 14, size, generator=rng) for size in sizes)
    offset = offset * 1.5
    geometry: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1}
    return lambda: dcnv3(x, offset, mask, **geometry, groups=groups)


# ---- boltzmann -----------------------------------------------------------------------------------


def _boltzmann_is_right(device: str) -> bool:
    """Two pairs at right angles: each row tells its own from the other by odds of e to 1."""
    import torch

    from m3i_fast.ops import boltzmann

    rows = torch.eye(2, device=device).requires_grad_()
    value = boltzmann(rows, rows.detach(), torch.ones((), device=device))
    (gradient,) = torch.autograd.grad(value, rows)
    other = 1 / (1 + math.e)
    grad = torch.tensor([[-other, other], [other, -other]], device=device) / 2
    expected = torch.tensor(-math.log(1 - other), device=device)
    return torch.allclose(value, expected) and torch.allclose(gradient, grad)


def _boltzmann_work() -> Callable[[], object]:
    """256 pairs of width 256; forward and backward, fp32."""
    import torch

    from m3i_fast.ops import boltzmann

    rng = torch.Generator().manual_seed(0)
    a, b = (
        torch.nn.functional.normalize(torch.randn(256, 256, generator=rng), dim=-1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(10.0)
    return lambda: torch.autograd.grad(boltzmann(a, b, scale), (a, b))


# ---- gaussian ------------------------------------------------------------------------------------


def _gaussian_is_right(device: str) -> bool:
    """Of a row that is its own layer-norm, against zeros."""
    import torch

    from m3i_fast.ops import gaussian

    z_hat = torch.zeros(3, 4, device=device, requires_grad=True)
    z = torch.tensor([3.0, 5.0, 3.0, 5.0], device=device).expand(3, 4).contiguous()
    value = gaussian(z_hat, z, normalise=True, eps=1e-12)
    (gradient,) = torch.autograd.grad(value, z_hat)
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0], device=device).expand(3, 4) / 12
    return torch.allclose(value, torch.full_like(value, 0.5)) and torch.allclose(gradient, grad)


def _gaussian_work() -> Callable[[], object]:
    """Return the demo's dense term: 64 pictures, 64 cells, width 192; both passes, fp32."""
    import torch

    from m3i_fast.ops import gaussian

    rng = torch.Generator().manual_seed(0)
    z_hat, z = (torch.randn(64, 64, 192, generator=rng) for _ in range(2))
    z_hat.requires_grad_()
    return lambda: torch.autograd.grad(gaussian(z_hat, z, sigma=0.5**0.5, normalise=True), z_hat)


# ---- add_layer_norm ------------------------------------------------------------------------------


def _add_layer_norm_is_right(device: str) -> bool:
    """Of a row and a branch whose sum is its own layer norm."""
    import torch

    from m3i_fast.ops import add_layer_norm

    x = torch.tensor([2.0, -3.0, 2.0, -3.0], device=device).expand(3, 4).contiguous()
    branch = torch.tensor([-1.0, 2.0, -1.0, 2.0], device=device).expand(3, 4).contiguous()
    x.requires_grad_()
    weight, bias = torch.full((4,), 2.0, device=device), torch.ones(4, device=device)
    total, normed = add_layer_norm(x, branch, weight, bias, eps=1e-12)
    (gradient,) = torch.autograd.grad(normed[:, 0].sum(), x)
    expected = torch.tensor([1.0, -1.0, 1.0, -1.0], device=device).expand(3, 4)
    grad = torch.tensor([1.0, 0.0, -1.0, 0.0], device=device).expand(3, 4)
    values = torch.allclose(total, expected) and torch.allclose(normed, 2 * expected + 1)
    return values and torch.allclose(gradient, grad, atol=1e-6)


def _add_layer_norm_work() -> Callable[[], object]:
    """Return the demo's norms: 64 pictures, 64 tokens, width 192; both passes, fp32."""
    import torch

    from m3i_fast.ops import add_layer_norm

    rng = torch.Generator().manual_seed(0)
    x, branch, of_sum, of_norm = (torch.randn(64, 64, 192, generator=rng) for _ in range(4))
    weight, bias = (torch.randn(192, generator=rng).requires_grad_() for _ in range(2))
    leaves = x.requires_grad_(), branch.requires_grad_(), weight, bias

    def run() -> object:
        results = add_layer_norm(x, branch, weight, bias)
        return torch.autograd.grad(results, leaves, (of_sum, of_norm))

    return run


# ---- views ---------------------------------------------------------------------------------------


def _views_is_right(device: str) -> bool:
    """Two pixels, twice, at their own size, mirrored and solarized."""
    import torch

    from m3i_fast.config.data import ViewConfig
    from m3i_fast.ops import views

    picture = torch.tensor([[[10, 200, 127], [90, 128, 250]]] * 2, dtype=torch.uint8, device=device)
    offset = torch.zeros(1, 1, dtype=torch.int64, device=device)
    size = torch.full((1, 1, 2), 2, device=device)
    row = [0.0, 0.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    params = torch.tensor([[row]], device=device)
    specs = views.view_specs(ViewConfig(count=1, size=2))
    (view,) = views.make_views(picture.flatten(), offset, size, params, views=specs)
    row_of = [[90, 10], [127, 55], [5, 127]]
    return view[0].tolist() == [[channel, channel] for channel in row_of]


def _views_work() -> Callable[[], object]:
    """8 pictures of 375 x 500 pixels, two views of 64 pixels each, with all that SSL changes."""
    import torch

    from m3i_fast.config.data import ViewConfig
    from m3i_fast.ops import views

    rng = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (8, 375, 500, 3), dtype=torch.uint8, generator=rng)
    offset = torch.arange(8).view(8, 1) * pictures[0].numel()
    sizes = torch.tensor([375, 500]).expand(8, 1, 2).contiguous()
    specs = views.view_specs(ViewConfig(size=64, blur_probability=0.5, solarize_probability=0.1))
    params = views.draw_views(sizes, torch.arange(8), seed=0, views=specs)
    return lambda: views.make_views(pictures.flatten(), offset, sizes, params, views=specs)


# ---- The list ------------------------------------------------------------------------------------

OPS: tuple[OpSpec, ...] = (
    OpSpec(
        name="mask_mix",
        title="Mixing and masking",
        is_right=_mask_mix_is_right,
        work=_mask_mix_work,
        measures="mask, mix and normalise views: ours beside the torch expressions it replaces",
        gpu=GpuBenchmark(worth=5, limit_s=60, small=("--num-samples", "2", "--no-compile")),
        sanitizer="tests/ops/mask_mix/test_mask_mix.py::test_cuda_gives_the_bits_of_the_cpu",
    ),
    OpSpec(
        name="dcnv3",
        title="DCNv3",
        is_right=_dcnv3_is_right,
        work=_dcnv3_work,
        measures="deformable convolution v3: ours beside grid_sample and torchvision",
        gpu=GpuBenchmark(worth=2, limit_s=240, skipped_small="takes minutes without a GPU"),
        sanitizer="tests/ops/dcnv3/test_cuda.py",
    ),
    OpSpec(
        name="boltzmann",
        title="Boltzmann likelihood",
        is_right=_boltzmann_is_right,
        work=_boltzmann_work,
        measures="the Boltzmann likelihood beside ClipLoss, SigLipLoss and F.cross_entropy",
        benchmark="ops.boltzmann.main",
        gpu=GpuBenchmark(
            worth=1,
            limit_s=120,
            small=("--ranks", "1,2", "--rows-per-rank", "64", "--dim", "32"),
        ),
        sanitizer="tests/ops/boltzmann/test_cuda.py::test_small_calls",
        kernels=r"^(RowSoftmax|Softmax|Sigmoid)(Backward)?$",  # autograd functions
    ),
    OpSpec(
        name="gaussian",
        title="Gaussian likelihood",
        is_right=_gaussian_is_right,
        work=_gaussian_work,
        measures="the Gaussian likelihood: ours beside torch's layer_norm and mse_loss",
        gpu=GpuBenchmark(worth=4, limit_s=90, small=("--num-samples", "2", "--no-compile")),
        sanitizer="tests/ops/gaussian/test_gaussian.py::test_on_a_gpu",
    ),
    OpSpec(
        name="views",
        title="Views of pictures",
        is_right=_views_is_right,
        work=_views_work,
        measures="crops, resized and changed in colour: ours beside torchvision's transforms",
        gpu=GpuBenchmark(worth=6, limit_s=60, small=("--num-samples", "2", "--batch-size", "4")),
        sanitizer="tests/ops/views/test_cuda.py::test_cuda_gives_the_bits_of_the_cpu",
        kernels=r"draw_views$|make_(views|patches)$",
    ),
    OpSpec(
        name="add_layer_norm",
        title="Residual sum and layer norm",
        is_right=_add_layer_norm_is_right,
        work=_add_layer_norm_work,
        measures="a branch's sum and layer norm: ours beside torch's add and layer_norm",
        gpu=GpuBenchmark(worth=7, limit_s=60, small=("--num-samples", "2", "--no-compile")),
        sanitizer="tests/ops/add_layer_norm/test_add_layer_norm.py::test_on_a_gpu",
    ),
)
