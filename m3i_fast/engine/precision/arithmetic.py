"""Which device and which arithmetic a run uses: a pure choice, and what looks at the machine."""

from __future__ import annotations

import importlib.util
import logging
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from m3i_fast.config import Backend, Precision
from m3i_fast.config.flops import Product
from m3i_fast.costs.gemm_rows import ALIGNMENT, FP8, GemmShapes, too_narrow

logger = logging.getLogger(__name__)

INSTALL_TORCHAO = 'pip install "m3i-fast[fp8]"'
INSTALL_TE = 'pip install --no-build-isolation "m3i-fast[te]"'
BF16_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
HOPPER, BLACKWELL = (9, 0), (10, 0)
BLOCK_CUDA = (12, 9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """Of a machine, what the choice of arithmetic depends on."""

    device: str
    """cpu or cuda."""
    capability: tuple[int, int] | None = None
    """Of the GPU."""
    cuda: tuple[int, int] | None = None
    """That torch was built with."""
    te: bool = False
    """Transformer Engine is installed."""
    torchao: bool = False

    @property
    def name(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else "a CPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    """The arithmetic of a run."""

    recipe: str
    """fp32, bf16 or one of FP8."""
    backend: str
    """torch, te or torchao."""
    compute_dtype: torch.dtype
    """Of all that is not FP8."""
    alignment: int = 1
    """What the rows of a product are a multiple of."""
    products: tuple[tuple[str, tuple[Product, ...]], ...] = ()
    """That run in FP8: part of the model, features in and out."""
    reduce_amax: bool = True
    """fp8_delayed: ranks share the largest values that their scales come from."""
    emulated: bool = False
    """For the numbers, not for the speed."""
    reasons: tuple[str, ...] = ()
    """A sentence each."""

    @property
    def is_fp8(self) -> bool:
        return self.recipe in FP8


def capabilities_of(device: torch.device) -> Capabilities:
    """Return what this machine and its GPU can do."""
    version = re.match(r"(\d+)\.(\d+)", torch.version.cuda or "")
    return Capabilities(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        cuda=(int(version[1]), int(version[2])) if version else None,
        te=importlib.util.find_spec("transformer_engine") is not None,
        torchao=importlib.util.find_spec("torchao") is not None,
    )


def resolve_device(requested: str) -> torch.device:
    """auto | cpu | cuda -> device. Raises ValueError when a GPU is asked for and there is none."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: expected a GPU for cuda, got none; `m3i-fast doctor` says why, --device cpu "
            "trains without"
        )
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(requested)


def resolve_precision(
    capabilities: Capabilities,
    shapes: GemmShapes,
    precision: Precision,
    backend: Backend,
    *,
    compiled: bool = False,
) -> Arithmetic:
    """The arithmetic for what is asked for, here; auto takes no FP8 by itself.

    Raises ValueError, with what to change or to install, for what this machine, library or batch
    cannot do. Nothing is replaced by something slower.
    """
    if precision not in FP8:
        return _without_fp8(capabilities, precision, backend, compiled)
    if refusal := refuse_recipe(capabilities, precision):
        raise ValueError(f"precision: {precision} on {capabilities.name}: {refusal}")
    if precision == "fp8_delayed" and compiled:
        raise ValueError(
            "compile: expected False with precision = fp8_delayed, whose scales torch.compile "
            "cannot trace, got True; set --no-compile or --precision fp8_current"
        )
    library, why = _fp8_backend(capabilities, precision, backend, compiled)
    if not shapes.wide:
        raise ValueError(f"precision: {precision}: {too_narrow(shapes)}; or --precision bf16")
    alignment = ALIGNMENT[precision]
    _expect_aligned(shapes, precision, alignment)
    shared = shapes.max_calls == 1
    reasons = [why, *_fp8_reasons(capabilities, shapes, alignment)]
    if precision == "fp8_delayed" and not shared:
        reasons.append(
            f"Each rank keeps its own scales: a module runs {shapes.max_calls} times in a step, "
            "and Transformer Engine shares them (reduce_amax) among ranks for a single run alone."
        )
    return Arithmetic(
        recipe=precision,
        backend=library,
        compute_dtype=torch.bfloat16,
        alignment=alignment,
        products=tuple(shapes.wide.items()),
        reduce_amax=shared,
        emulated=capabilities.device == "cpu",
        reasons=tuple(reasons),
    )


def _without_fp8(
    capabilities: Capabilities, precision: str, backend: str, compiled: bool
) -> Arithmetic:
    if backend == "torchao":
        raise ValueError(
            f"backend: expected torch or te with precision = {precision}, got torchao, which is "
            "for fp8_current; set --backend torch or --precision fp8_current"
        )
    if backend == "te":
        _expect_te(capabilities, compiled)
    recipe, reason = precision, f"{precision} as asked for."
    if precision == "auto":
        has_bf16 = (capabilities.capability or (0, 0)) >= BF16_CAPABILITY
        recipe = "bf16" if has_bf16 else "fp32"
        reason = f"{recipe} on {capabilities.name}; auto takes no FP8 by itself."
    dtype = torch.bfloat16 if recipe == "bf16" else torch.float32
    library = "te" if backend == "te" else "torch"
    return Arithmetic(recipe=recipe, backend=library, compute_dtype=dtype, reasons=(reason,))


def refuse_recipe(capabilities: Capabilities, recipe: str) -> str:
    """Why a recipe of FP8 cannot run here and what to do instead; empty where it can."""
    found, instead = capabilities.capability, "set --precision bf16"
    current = "set --precision fp8_current"
    if capabilities.device == "cpu":
        if recipe != "fp8_current":
            return f"expected a GPU and Transformer Engine; {current}"
        missing = f"expected torchao, which emulates it; {INSTALL_TORCHAO}, or {instead}"
        return "" if capabilities.torchao else missing
    if found is None or found < FP8_CAPABILITY:
        return f"expected sm_89 or newer (L40S, H100, B200); {instead}"
    if recipe == "mxfp8" and found[0] != BLACKWELL[0]:
        return f"expected Blackwell, sm_100; {current}"
    if recipe == "fp8_block":
        have = ".".join(map(str, capabilities.cuda or ())) or "none"
        if found != HOPPER:
            return f"expected Hopper, sm_90; {current}"
        if (capabilities.cuda or (0, 0)) < BLOCK_CUDA:
            return f"expected a torch of CUDA 12.9 or newer, got {have}; install one, or {current}"
    if capabilities.te or (recipe == "fp8_current" and capabilities.torchao):
        return ""
    if recipe != "fp8_current":
        return f"expected Transformer Engine, not installed; {INSTALL_TE}, or {current}"
    return (
        f"expected Transformer Engine or torchao, got neither; {INSTALL_TE} or {INSTALL_TORCHAO}, "
        f"or {instead}"
    )


def _fp8_backend(
    capabilities: Capabilities, recipe: str, backend: str, compiled: bool
) -> tuple[str, str]:
    """The library that runs it, and why."""
    if backend == "torch":
        raise ValueError(
            f"backend: expected auto, te or torchao with precision = {recipe}, got torch, which "
            "has no FP8 layers; set --backend auto or --precision bf16"
        )
    if backend == "torchao" and recipe != "fp8_current":
        raise ValueError(
            f"backend: expected te with precision = {recipe}, got torchao; set --backend te or "
            "--precision fp8_current"
        )
    if backend == "torchao" and not capabilities.torchao:
        raise ValueError(
            f"backend: torchao is not installed; {INSTALL_TORCHAO}, or set --backend te"
        )
    can_te = capabilities.te and capabilities.device == "cuda" and not compiled
    if backend == "te" or (recipe != "fp8_current" and not can_te):
        _expect_te(capabilities, compiled)
    if backend != "auto":
        return backend, f"{recipe} by {backend} as asked for."
    if can_te:
        return "te", f"{recipe} by Transformer Engine, which is installed."
    if not capabilities.torchao:
        _expect_te(capabilities, compiled)
    why = "compiled blocks take no Transformer Engine" if compiled else "no Transformer Engine here"
    return "torchao", f"{recipe} by torchao: {why}."


def _expect_te(capabilities: Capabilities, compiled: bool) -> None:
    if capabilities.device != "cuda":
        raise ValueError(
            "backend: te needs a GPU, got a CPU; set --backend torch, or torchao for fp8_current"
        )
    if not capabilities.te:
        raise ValueError(
            f"backend: Transformer Engine is not installed; {INSTALL_TE}, or set --backend torch, "
            "or torchao for fp8_current"
        )
    if compiled:
        raise ValueError(
            "compile: expected False with Transformer Engine, whose layers torch.compile cannot "
            "trace, got True; set --no-compile, or --backend torchao for fp8_current"
        )


def _expect_aligned(shapes: GemmShapes, recipe: str, alignment: int) -> None:
    reason = shapes.misfit(shapes.batch_size, alignment)
    if not reason:
        return
    near = list(dict.fromkeys(str(b) for b in shapes.nearest(alignment) if b is not None))
    change = f"set --data.batch-size {' or '.join(near)}" if near else "no batch near it is legal"
    raise ValueError(
        f"data.batch_size: expected the tokens of every product in {recipe} to be a multiple of "
        f"{alignment}, got {shapes.batch_size} images: {reason}; {change}"
    )


def _fp8_reasons(capabilities: Capabilities, shapes: GemmShapes, alignment: int) -> list[str]:
    wide = shapes.wide
    found = [
        f"Tokens of every product are a multiple of {alignment}.",
        f"In FP8: the blocks of {', '.join(wide)}, products of {shapes.min_dim} or more features "
        "in and out (fp8_min_dim); patches, heads, prototypes and projections stay in bf16.",
    ]
    if narrow := [part for part in shapes.products if part not in wide]:
        found.append(f"Too narrow, in bf16: {', '.join(narrow)}.")
    if capabilities.device == "cpu":
        found.append("On a CPU FP8 is emulated.")
    return found


def log_arithmetic(arithmetic: Arithmetic) -> None:
    """Log what was chosen and why, and warn of an emulation."""
    logger.info("precision: %s", " ".join(arithmetic.reasons))
    if arithmetic.emulated:
        logger.warning(
            "precision: %s is emulated on a CPU, for its numbers: slower than bf16",
            arithmetic.recipe,
        )


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Of matrix products that are not FP8. auto is bf16 on a GPU that has it, fp32 elsewhere."""
    if precision == "auto":
        on_gpu = device.type == "cuda"
        has_bf16 = on_gpu and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
        precision = "bf16" if has_bf16 else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The forward pass's autocast, to `compute_dtype`."""
    low = compute_dtype(precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
