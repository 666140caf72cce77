"""The contrastive losses that boltzmann measures, over the same inputs, and their bare GEMMs.

Legend: N rows of z_hat, M rows ("columns") of z, D features; one GEMM is 2 N M D flop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.ops import SoftTargets, boltzmann

OURS = "m3i_fast"
CLIP, SIGLIP = "ClipLoss", "SigLipLoss"
SIGLIP_KERNEL, LIGER, LINEAR = "siglip-kernel", "Liger", "linear_cross_entropy"
Form = Literal["softmax", "sigmoid", "classes", "soft"]
_NAMES: dict[Form, tuple[str, ...]] = {
    "softmax": (OURS, CLIP),
    "sigmoid": (OURS, SIGLIP, SIGLIP_KERNEL),
    "classes": (OURS, "cross_entropy", LINEAR, LIGER),
    "soft": (OURS, "cross_entropy"),
}
_MODULES = {
    CLIP: "open_clip.loss",
    SIGLIP: "open_clip.loss",
    SIGLIP_KERNEL: "siglip_kernel",
    LIGER: "liger_kernel.transformers",
}

# GEMMs of forward and backward: those that the mathematics needs where logits are kept, and those
# that ours runs. A softmax over rows and columns is known after all of its sums only, so ours
# computes the products twice; soft targets have products of their own.
MODEL_GEMMS: dict[Form, int] = {"softmax": 3, "sigmoid": 3, "classes": 3, "soft": 4}
OUR_GEMMS: dict[Form, int] = {"softmax": 4, "sigmoid": 3, "classes": 3, "soft": 4}
_COUNTED = {1: "one_gemm", 2: "two_gemms", 3: "three_gemms", 4: "four_gemms"}

# Logits and what is derived from them: whole matrices [N, M] alive at the peak, measured.
NUM_MATRICES = {CLIP: 5, SIGLIP: 6}

# CLIP's and SigLIP's temperatures at the start of training.
_SCALE: dict[Form, float] = {
    "softmax": 1 / 0.07,
    "sigmoid": 10.0,
    "classes": 1 / 0.07,
    "soft": 1 / 0.1,  # DINO's student; its teacher has 1 / 0.04
}
_TEACHER_SCALE = 1 / 0.04
_SIGMOID_BIAS = -10.0

# Half types: the others round logits of up to 14, ours only its inputs.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    form: Form
    rows: int
    columns: int
    dim: int

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.form in ("softmax", "sigmoid") and self.rows != self.columns:
            raise ValueError(
                f"columns: expected {self.rows} as rows of a {self.form}, got {self.columns}"
            )

    @property
    def gemm_flop(self) -> int:
        return 2 * self.rows * self.columns * self.dim

    def __str__(self) -> str:
        return f"{self.form}, {self.rows}x{self.columns}x{self.dim}"


class Inputs(NamedTuple):
    """Rows of length one, as of a normalised projection; row i of z_hat is near its positive."""

    z_hat: Tensor  # [N, D]
    z: Tensor  # [M, D]
    scale: Tensor  # [] fp32
    bias: Tensor | None = None  # [] fp32, of the sigmoid form
    targets: Tensor | None = None  # [N] int64, of classes
    teacher: SoftTargets | None = None  # of the soft form


Loss = Callable[[Inputs], Tensor]


def make_inputs(
    size: Size, dtype: torch.dtype, device: str, *, backward: bool, seed: int = 0
) -> Inputs:
    """Draw inputs, the same on every device; with `backward`, all but targets need gradients."""
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(size.columns, size.dim, generator=generator), dim=1)
    noise = F.normalize(torch.randn(size.rows, size.dim, generator=generator), dim=1)
    targets = torch.arange(size.rows) % size.columns
    z_hat = F.normalize(z[targets] + noise, dim=1)
    scale, bias = torch.tensor(_SCALE[size.form]), torch.tensor(_SIGMOID_BIAS)

    teacher = None
    if size.form == "soft":
        features = (rows.to(device, dtype) for rows in (z_hat, z.roll(1, 0)))
        centre = torch.randn(size.columns, generator=generator)
        teacher = SoftTargets(*features, *(
            x.to(device) for x in (torch.tensor(_TEACHER_SCALE), centre)
        ))  # fmt: skip

    def leaf(tensor: Tensor, kind: torch.dtype) -> Tensor:
        return tensor.to(device, kind).requires_grad_(backward)

    return Inputs(
        leaf(z_hat, dtype),
        leaf(z, dtype),
        leaf(scale, torch.float32),
        leaf(bias, torch.float32) if size.form == "sigmoid" else None,
        targets.to(device) if size.form == "classes" else None,
        teacher,
    )


def run(loss: Loss, inputs: Inputs) -> Tensor:  # []
    """Return the value, and compute the gradients that inputs require."""
    value = loss(inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if leaves:
        torch.autograd.grad(value, leaves)
    return value.detach()


# ---- What is timed -------------------------------------------------------------------------------


def losses(form: Form, device: str) -> dict[str, Loss]:
    """Return losses by name, ours first; libraries' where they import, fused ones on CUDA."""
    return {name: make_loss(name, form) for name in _NAMES[form] if can_run(name, device)}


def can_run(name: str, device: str) -> bool:
    """Return whether a loss runs here; where it does not, the log says why, once."""
    if name in (SIGLIP_KERNEL, LIGER) and device != "cuda":
        return False
    try:
        if name in _MODULES:
            import_module(_MODULES[name])
    except ImportError as error:
        _say_left_out(name, str(error))
        return False
    if name == LINEAR and not hasattr(F, LINEAR):
        _say_left_out(name, f"torch {torch.__version__} is older than 2.13")
        return False
    return True


@cache
def _say_left_out(name: str, why: str) -> None:
    logger.warning("%s left out: %s", name, why)


def make_loss(name: str, form: Form) -> Loss:
    """Return the loss of that name; its library is imported here and no other."""
    if name == OURS:
        return {
            "softmax": _our_softmax,
            "sigmoid": _our_sigmoid,
            "classes": _our_classes,
            "soft": _our_soft,
        }[form]
    if name == CLIP:
        from open_clip.loss import ClipLoss

        clip = ClipLoss()
        return lambda i: clip(i.z_hat, i.z, i.scale)
    if name == SIGLIP:
        from open_clip.loss import SigLipLoss

        siglip = SigLipLoss()
        return lambda i: siglip(i.z_hat, i.z, i.scale, i.bias)
    if name == SIGLIP_KERNEL:
        from siglip_kernel import fused_siglip_loss

        return lambda i: fused_siglip_loss(i.z_hat, i.z, i.scale.log(), i.bias)
    if name == LIGER:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        return lambda i: liger(i.z, i.scale * i.z_hat, i.targets)
    if name == LINEAR:
        return _linear_cross_entropy
    if name == "cross_entropy":
        return _soft_cross_entropy if form == "soft" else _cross_entropy
    raise ValueError(f"name: expected a loss of boltzmann, got {name!r}")


def _our_softmax(i: Inputs) -> Tensor:
    return boltzmann(i.z_hat, i.z, i.scale)


def _our_sigmoid(i: Inputs) -> Tensor:
    return boltzmann(i.z_hat, i.z, i.scale, bias=i.bias, form="sigmoid")


def _our_classes(i: Inputs) -> Tensor:
    return boltzmann(i.z_hat, i.z, i.scale, targets=i.targets)


def _our_soft(i: Inputs) -> Tensor:
    return boltzmann(i.z_hat, i.z, i.scale, targets=i.teacher)


def _soft_cross_entropy(i: Inputs) -> Tensor:
    of = i.teacher
    assert of is not None and of.column_log_scale is not None
    with torch.no_grad():
        targets = (of.scale * of.z_hat @ of.z.T + of.column_log_scale).softmax(1)
    return F.cross_entropy((i.scale * i.z_hat @ i.z.T).to(targets.dtype), targets)


def _cross_entropy(i: Inputs) -> Tensor:
    assert i.targets is not None
    return F.cross_entropy(i.scale * i.z_hat @ i.z.T, i.targets)


def _linear_cross_entropy(i: Inputs) -> Tensor:
    assert i.targets is not None
    options = torch.nn.LinearCrossEntropyOptions()  # in chunks; without them it is cross_entropy
    return F.linear_cross_entropy(i.scale * i.z_hat, i.z, i.targets, options=options)


def make_floor(
    size: Size, dtype: torch.dtype, device: str, *, backward: bool
) -> tuple[str, Callable[[], object]]:
    """Return torch's GEMMs of our loss alone: whole matrices, written where memory allows.

    Forward: S = A B^T, of soft targets twice. Backward: S once more for a softmax in both
    directions, then G B and G^T A, with S for G.
    Ours works in tiles that stay in the cache, and so may be faster than these on a CPU.
    """
    z_hat, z = make_inputs(size, dtype, device, backward=False)[:2]
    logits = z.new_empty(size.rows, size.columns)
    grad_z_hat, grad_z = torch.empty_like(z_hat), torch.empty_like(z)
    count = OUR_GEMMS[size.form] if backward else 1 + (size.form == "soft")
    num_logits = count - 2 * backward

    def gemms() -> None:
        for _ in range(num_logits):
            torch.mm(z_hat, z.T, out=logits)
        if backward:
            torch.mm(logits, z, out=grad_z_hat)
            torch.mm(logits.T, z_hat, out=grad_z)

    return _COUNTED[count], gemms


def make_functions(
    size: Size, dtype: torch.dtype, device: str, *, backward: bool
) -> dict[str, Callable[[], object]]:
    """Return the timed functions, over the same inputs; each loss has the same value.

    A loss that cannot run is left out, and the log says why: no memory on a GPU, mostly.
    """
    floor_name, gemms = make_floor(size, dtype, device, backward=backward)  # holds its memory
    inputs = make_inputs(size, dtype, device, backward=backward)
    functions: dict[str, Callable[[], object]] = {}
    expected: Tensor | None = None
    for name, loss in losses(size.form, device).items():
        function = partial(run, loss, inputs)
        try:
            value = function()
        except RuntimeError as error:
            if expected is None:
                raise
            logger.warning("%s of %s left out: %s", name, size, str(error).splitlines()[0])
            continue
        expected = value if expected is None else expected
        assert_same(name, value, expected, dtype)
        functions[name] = function
    return {**functions, floor_name: gemms}


def assert_same(name: str, value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError for a loss whose value differs from ours."""
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(
        value.float(),
        expected.float(),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda text: f"{name}: {text}",
    )
