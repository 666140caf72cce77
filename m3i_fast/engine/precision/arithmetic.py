"""The device and the arithmetic of a run: a pure choice, and what it reads of the machine."""

from __future__ import annotations

import importlib.util
import logging
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from m3i_fast.config import Backend, Precision
from m3i_fast.config.objective.flops import Product
from m3i_fast.costs.gemm_shapes import ALIGNMENT, FP8, GemmShapes, too_narrow

logger = logging.getLogger(__name__)

INSTALL_TORCHAO = 'pip install "m3i-fast[fp8]"'
INSTALL_TE = 'pip install --no-build-isolation "m3i-fast[te]"'
BF16_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
HOPPER, BLACKWELL = (9, 0), (10, 0)
BLOCK_CUDA = (12, 9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What the choice of arithmetic depends on in a machine."""

    device: str
    """Device type, cpu or cuda."""
    capability: tuple[int, int] | None = None
    """Compute capability of the GPU; None on a CPU."""
    cuda: tuple[int, int] | None = None
    """CUDA version that torch was built with; None for a CPU build."""
    te: bool = False
    """Whether Transformer Engine is installed."""
    torchao: bool = False
    """Whether torchao is installed."""

    @property
    def name(self) -> str:
        """Return the name of the machine for messages: `sm_90` or `a CPU`."""
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else "a CPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    """The arithmetic that was chosen for a run."""

    recipe: str
    """Name of the recipe: fp32, bf16 or one of the FP8 recipes."""
    backend: str
    """Library of the layers: torch, te or torchao."""
    compute_dtype: torch.dtype
    """Dtype of all matrix products that are not in FP8."""
    alignment: int = 1
    """Number that the rows of every FP8 product are a multiple of."""
    products: tuple[tuple[str, tuple[Product, ...]], ...] = ()
    """Products in FP8: part of the model, then (features in, features out) of each."""
    reduce_amax: bool = True
    """Whether ranks share the largest values that the scales of fp8_delayed come from."""
    warning: str = ""
    """Why FP8 is slower than bf16 here; empty if it need not be."""
    reasons: tuple[str, ...] = ()
    """Why this was chosen, a sentence each."""

    @property
    def is_fp8(self) -> bool:
        """Return whether the recipe is one of FP8."""
        return self.recipe in FP8


def capabilities_of(device: torch.device) -> Capabilities:
    """Return the capabilities of this machine and its GPU."""
    version = re.match(r"(\d+)\.(\d+)", torch.version.cuda or "")
    return Capabilities(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        cuda=(int(version[1]), int(version[2])) if version else None,
        te=importlib.util.find_spec("transformer_engine") is not None,
        torchao=importlib.util.find_spec("torchao") is not None,
    )


def resolve_device(requested: str) -> torch.device:
    """Return the device for auto, cpu or cuda; raise ValueError for cuda where there is no GPU."""
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
    """Return the arithmetic for the requested precision and backend on this machine.

    `auto` never chooses FP8. Raises ValueError, with what to change or to install, for what this
    machine, library or batch cannot do: nothing is replaced by a slower form.
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
    warning = ""
    if capabilities.device == "cpu":
        warning = f"{precision} is emulated on a CPU, for its numbers: it is slower than bf16"
    elif library == "torchao" and not compiled:  # 6,851 instead of 991 in a step of the demo
        warning = (
            f"{precision} by torchao launches seven times as many kernels as bf16 unless the "
            "blocks are compiled; set --compile or --precision bf16"
        )
    return Arithmetic(
        recipe=precision,
        backend=library,
        compute_dtype=torch.bfloat16,
        alignment=alignment,
        products=tuple(shapes.wide.items()),
        reduce_amax=shared,
        warning=warning,
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
    recipe, reason = precision, f"{precision} as requested."
    if precision == "auto":
        has_bf16 = (capabilities.capability or (0, 0)) >= BF16_CAPABILITY
        recipe = "bf16" if has_bf16 else "fp32"
        reason = f"{recipe} on {capabilities.name}; auto never chooses FP8."
    dtype = torch.bfloat16 if recipe == "bf16" else torch.float32
    library = "te" if backend == "te" else "torch"
    return Arithmetic(recipe=recipe, backend=library, compute_dtype=dtype, reasons=(reason,))


def refuse_recipe(capabilities: Capabilities, recipe: str) -> str:
    """Return why an FP8 recipe cannot run here and what to do instead; empty where it can."""
    capability, instead = capabilities.capability, "set --precision bf16"
    current = "set --precision fp8_current"
    if capabilities.device == "cpu":
        if recipe != "fp8_current":
            return f"expected a GPU and Transformer Engine; {current}"
        missing = f"expected torchao, which emulates it; {INSTALL_TORCHAO}, or {instead}"
        return "" if capabilities.torchao else missing
    if capability is None or capability < FP8_CAPABILITY:
        return f"expected sm_89 or newer (L40S, H100, B200); {instead}"
    if recipe == "mxfp8" and capability[0] != BLACKWELL[0]:
        return f"expected Blackwell, sm_100; {current}"
    if recipe == "fp8_block":
        have = ".".join(map(str, capabilities.cuda or ())) or "none"
        if capability != HOPPER:
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
    """Return the library that runs the recipe, and why it was chosen."""
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
        return backend, f"{recipe} by {backend} as requested."
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
    reasons = [
        f"Tokens of every product are a multiple of {alignment}.",
        f"In FP8: the blocks of {', '.join(wide)}, products of {shapes.min_dim} or more features "
        "in and out (fp8_min_dim); patches, heads, prototypes and projections stay in bf16.",
    ]
    if narrow := [part for part in shapes.products if part not in wide]:
        reasons.append(f"Too narrow, in bf16: {', '.join(narrow)}.")
    if capabilities.device == "cpu":
        reasons.append("On a CPU FP8 is emulated.")
    return reasons


def log_arithmetic(arithmetic: Arithmetic) -> None:
    """Log the chosen arithmetic with its reasons, and warn if FP8 is slower than bf16."""
    logger.info("precision: %s", " ".join(arithmetic.reasons))
    if arithmetic.warning:
        logger.warning("precision: %s", arithmetic.warning)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products that are not in FP8.

    `auto` is bf16 on a GPU that has it, and fp32 elsewhere.
    """
    if precision == "auto":
        on_gpu = device.type == "cuda"
        has_bf16 = on_gpu and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
        precision = "bf16" if has_bf16 else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the autocast context of the forward pass, to `compute_dtype`."""
    low = compute_dtype(precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)
