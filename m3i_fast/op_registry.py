"""The one list of ops: what the doctor, `make gpu`, benchmarks, profiles and tables know of each.

An op's folder in cuda/, its Python file, its plain-torch reference, its test, its benchmark and its
rows in the ledger share its name. At module level only the standard library, and beside ops/, which
loads torch: `m3i-fast bench` lists names in a moment, `make gpu` runs this file by its path before
the package is built, and a process of `m3i-fast bench compare` beside another version of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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
class Call:
    """A call of an op that is compared with the op's plain-torch reference in float64."""

    what: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: dict[str, Any]
    """Arguments of both by name, tensors on the CPU. In float64 an argument that is a dtype is
    float64, too."""
    leaves: tuple[str, ...] = ()
    """Inputs whose gradients are compared, too."""

    def results(self, device: str, *, exact: bool = False) -> list[Tensor]:
        """Return the op's results and gradients on a device; exact: the reference's in float64."""
        import torch

        def placed(name: str, value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return torch.float64 if exact else value
            if not isinstance(value, torch.Tensor):
                return value
            dtype = torch.float64 if exact and value.is_floating_point() else value.dtype
            return value.to(device, dtype, copy=True).requires_grad_(name in self.leaves)

        given = {name: placed(name, value) for name, value in self.inputs.items()}
        made = (self.reference if exact else self.op)(**given)
        results = [made] if isinstance(made, torch.Tensor) else list(made)
        if not self.leaves:
            return results
        steps = (torch.arange(r.numel(), device=r.device).view_as(r) for r in results)
        weights = [  # from -1 to 1, which every dtype holds exactly
            ((step * 37 % 255 - 127) / 128).to(r.dtype)
            for step, r in zip(steps, results, strict=True)
        ]
        grads = torch.autograd.grad(results, [given[name] for name in self.leaves], weights)
        return [*(result.detach() for result in results), *grads]

    def error(self, device: str) -> float:
        """Return the largest error of a result or gradient; 1 is the largest that is right."""
        import torch

        # Of the largest number of a result. A half type rounds results and what kernels exchange.
        allowed = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.uint8: 1 / 255}
        pairs = zip(self.results(device), self.results("cpu", exact=True), strict=True)
        errors = [
            (ours.cpu().double() - truth).abs().max() / (allowed[ours.dtype] * truth.abs().max())
            for ours, truth in pairs
        ]
        return float(torch.stack(errors).max())  # which is NaN if one of them is


@dataclass(frozen=True, kw_only=True, slots=True)
class OpSpec:
    """One op, by the name that all of its files share."""

    name: str
    title: str
    """What pages call it."""
    calls: Callable[[bool], Iterator[Call]]
    """Calls that launch every kernel of the op in a step; True: in a GPU's sizes, too."""
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

    def is_right(self, device: str) -> bool:
        """Compare the results of small calls on `cpu` or `cuda`."""
        return all(call.error(device) <= 1 for call in self.calls(False))

    @property
    def module(self) -> str:
        """Return the benchmark's module below benchmarks/."""
        return self.benchmark or f"ops.{self.name}"

    @property
    def budget(self) -> str:
        """Return the file with the registers and shared memory of its kernels, from the root."""
        return f"cuda/{self.name}/budget.json"


# ---- mask_mix ------------------------------------------------------------------------------------


def _mask_mix_calls(large: bool) -> Iterator[Call]:
    import torch

    from m3i_fast.ops import mask_mix, reference

    rng = torch.Generator().manual_seed(0)
    exact = partial(reference.mask_mix, compute_dtype=torch.float64)
    # A thread has as many pixels as a cell's width allows.
    sizes = [(6, 16, 4, 5), (6, 4, 15, 9), (6, 3, 5, 7)] + [(128, 16, 14, 14)] * large
    for dtype in (torch.bfloat16, torch.float32):
        for pictures, patch, rows, columns in sizes:
            height, width = rows * patch, columns * patch
            views = torch.randint(
                256, (pictures, 3, height, width), dtype=torch.uint8, generator=rng
            )
            choice = torch.randint(2, (pictures, rows, columns), dtype=torch.uint8, generator=rng)
            members = torch.randint(pictures, (pictures, 2), generator=rng)
            yield Call(
                what=f"{dtype}, {pictures} x {height} x {width}, cells of {patch}",
                op=mask_mix,
                reference=exact,
                inputs={"views": views, "choice": choice, "members": members, "dtype": dtype},
            )


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


def _dcnv3_calls(large: bool) -> Iterator[Call]:
    import torch

    from m3i_fast.ops import dcnv3, reference

    rng = torch.Generator().manual_seed(0)
    geometry = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "softmax": True}
    for dtype in (torch.bfloat16, torch.float32):
        for batch, side, groups in [(2, 14, 4)] + [(8, 56, 8)] * large:
            sizes = 16 * groups, 18 * groups, 9 * groups
            x, offset, mask = (
                torch.randn(batch, side, side, size, generator=rng).to(dtype) for size in sizes
            )
            yield Call(
                what=f"{dtype}, {batch} x {side} x {side} x {sizes[0]}",
                op=dcnv3,
                reference=reference.dcnv3,
                inputs={"x": x, "offset": offset, "mask": mask, "groups": groups, **geometry},
                leaves=("x", "offset", "mask"),
            )


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


def _boltzmann_calls(large: bool) -> Iterator[Call]:
    import torch
    from torch.nn.functional import normalize

    from m3i_fast.ops import boltzmann, reference

    rng = torch.Generator().manual_seed(0)
    bf16, fp32 = torch.bfloat16, torch.float32

    def call(
        what: str,
        rows: int,
        columns: int,
        dim: int,
        dtype: torch.dtype = bf16,
        scale: float = 10.0,
        gap: float = 0.0,  # of a direction that rows have and columns have negated
        **options: Any,
    ) -> Call:
        z = torch.randn(columns, dim, generator=rng) / dim**0.5
        z_hat = z[torch.arange(rows) % columns] + torch.randn(rows, dim, generator=rng) / dim**0.5
        apart = gap * normalize(torch.randn(dim, generator=rng), dim=0)
        features = (normalize(each, dim=1).to(dtype) for each in (z_hat + apart, z - apart))
        leaves = ("z_hat", "z", *(name for name in ("bias",) if name in options))
        if not gap:  # with it the gradient by the scale is a sum of equal numbers that cancel
            leaves += ("scale",)
        return Call(
            what=f"{dtype}, {rows} x {columns} x {dim}, {what}",
            op=boltzmann,
            reference=reference.boltzmann,
            inputs=dict(zip(("z_hat", "z"), features, strict=True))
            | {"scale": torch.tensor(scale), **options},
            leaves=leaves,
        )

    ids, classes = torch.arange(300) % 37, torch.arange(520) % 37
    labels: dict[str, Any] = {"row_ids": ids.masked_fill(ids == 3, -1), "col_ids": classes}
    yield call("labels", 300, 520, 264, **labels)
    # The largest logit of a row is 150 below the largest possible: sums by one shift a row. With a
    # larger gap all columns are almost one vector, and products of bf16 weights with them cancel.
    yield call("sums once more", 300, 520, 264, scale=100.0, gap=2.0, **labels)
    yield call("classes", 300, 520, 264, targets=torch.arange(300) % 11 - 1)
    yield call("sigmoid", 300, 300, 264, form="sigmoid", bias=torch.tensor(-4.5))
    yield call("pairs", 33, 33, 17, fp32)
    if large:  # of several blocks of C, and of clusters that wait for each other
        yield call("pairs", 4608, 4608, 512)


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


def _gaussian_calls(large: bool) -> Iterator[Call]:
    import torch

    from m3i_fast.ops import gaussian, reference

    rng = torch.Generator().manual_seed(0)
    shapes = [(5, 30, 264)] + [(64, 196, 768)] * large
    for dtype, shape in [(torch.bfloat16, shape) for shape in shapes] + [(torch.float32, (3, 17))]:
        z_hat, z = (torch.randn(*shape, generator=rng) for _ in range(2))
        for weight in (0.0, 0.05):
            yield Call(
                what=f"{dtype}, {list(shape)}, decorrelation {weight}",
                op=partial(gaussian, normalise=True, decorrelation_weight=weight),
                reference=partial(reference.gaussian, normalise=True, decorrelation_weight=weight),
                inputs={"z_hat": z_hat.to(dtype), "z": 3 * z + 2},
                leaves=("z_hat",),
            )


def _gaussian_work() -> Callable[[], object]:
    """Return the demo's dense term: 64 pictures, 64 cells, width 192; both passes, fp32."""
    import torch

    from m3i_fast.ops import gaussian

    rng = torch.Generator().manual_seed(0)
    z_hat, z = (torch.randn(64, 64, 192, generator=rng) for _ in range(2))
    z_hat.requires_grad_()
    return lambda: torch.autograd.grad(gaussian(z_hat, z, sigma=0.5**0.5, normalise=True), z_hat)


# ---- add_layer_norm ------------------------------------------------------------------------------


def _add_layer_norm_calls(large: bool) -> Iterator[Call]:
    import torch

    from m3i_fast.ops import add_layer_norm, reference

    rng = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in [(3, 50, 264)] + [(64, 196, 768)] * large:
            x, branch = (torch.randn(*shape, generator=rng) for _ in range(2))
            weight, bias = (torch.randn(shape[-1], generator=rng) for _ in range(2))
            inputs = {"x": x, "branch": branch.to(dtype), "weight": weight, "bias": bias}
            yield Call(
                what=f"{dtype}, {list(shape)}",
                op=add_layer_norm,
                reference=reference.add_layer_norm,
                inputs=inputs | {"dtype": dtype},
                leaves=tuple(inputs),
            )


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


def _views_calls(large: bool) -> Iterator[Call]:
    import torch

    from m3i_fast.config.data import ViewConfig
    from m3i_fast.ops import reference, views

    rng = torch.Generator().manual_seed(0)
    for pictures, side in [(3, 40)] + [(16, 224)] * large:
        pixels = torch.randint(256, (pictures, 75, 100, 3), dtype=torch.uint8, generator=rng)
        sizes = torch.tensor([75, 100]).expand(pictures, 1, 2).contiguous()
        # No colours, whose steps round to the level below.
        cfg = ViewConfig(
            size=side,
            blur_probability=0.5,
            solarize_probability=0.5,
            gray_probability=0.0,
            jitter_probability=0.0,
        )
        specs = views.view_specs(cfg)
        inputs = {
            "pixels": pixels.flatten(),
            "offset": torch.arange(pictures).view(-1, 1) * pixels[0].numel(),
            "image_size": sizes,
            "params": views.draw_views(sizes, torch.arange(pictures), seed=0, views=specs),
        }
        yield Call(
            what=f"{pictures} pictures, views of {side}",
            op=partial(views.make_views, views=specs),
            reference=partial(reference.views, views=specs),
            inputs=inputs,
        )


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
        calls=_mask_mix_calls,
        work=_mask_mix_work,
        measures="mask, mix and normalise views: ours beside the torch expressions it replaces",
        gpu=GpuBenchmark(worth=5, limit_s=60, small=("--num-samples", "2", "--no-compile")),
        sanitizer="tests/ops/mask_mix/test_mask_mix.py::test_cuda_gives_the_bits_of_the_cpu",
    ),
    OpSpec(
        name="dcnv3",
        title="DCNv3",
        calls=_dcnv3_calls,
        work=_dcnv3_work,
        measures="deformable convolution v3: ours beside grid_sample and torchvision",
        gpu=GpuBenchmark(worth=2, limit_s=240, skipped_small="takes minutes without a GPU"),
        sanitizer="tests/ops/dcnv3/test_cuda.py",
    ),
    OpSpec(
        name="boltzmann",
        title="Boltzmann likelihood",
        calls=_boltzmann_calls,
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
        calls=_gaussian_calls,
        work=_gaussian_work,
        measures="the Gaussian likelihood: ours beside torch's layer_norm and mse_loss",
        gpu=GpuBenchmark(worth=4, limit_s=90, small=("--num-samples", "2", "--no-compile")),
        sanitizer="tests/ops/gaussian/test_gaussian.py::test_on_a_gpu",
    ),
    OpSpec(
        name="views",
        title="Views of pictures",
        calls=_views_calls,
        work=_views_work,
        measures="crops, resized and changed in colour: ours beside torchvision's transforms",
        gpu=GpuBenchmark(worth=6, limit_s=60, small=("--num-samples", "2", "--batch-size", "4")),
        sanitizer="tests/ops/views/test_cuda.py::test_cuda_gives_the_bits_of_the_cpu",
        kernels=r"draw_views$|make_(views|patches)$",
    ),
    OpSpec(
        name="add_layer_norm",
        title="Residual sum and layer norm",
        calls=_add_layer_norm_calls,
        work=_add_layer_norm_work,
        measures="a branch's sum and layer norm: ours beside torch's add and layer_norm",
        gpu=GpuBenchmark(worth=7, limit_s=60, small=("--num-samples", "2", "--no-compile")),
        sanitizer="tests/ops/add_layer_norm/test_add_layer_norm.py::test_on_a_gpu",
    ),
)
