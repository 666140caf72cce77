"""Sizes and options of the Vision Transformer, and the published ones by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from m3i_fast.config.fields import (
    DEPTHS,
    SIDES,
    WIDTHS,
    Checked,
    Conflict,
    DropPathMode,
    Mlp,
    Recompute,
    mlp_ratio_conflicts,
    unmet,
)

Position = Literal["absolute", "rotary"]
AttentionKernel = Literal["auto", "flash", "fa3", "fa4", "cudnn", "math"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig(Checked):
    """Size a Vision Transformer, and choose its options."""

    encodes_cells_alone: ClassVar[bool] = True
    """Any subset of an image's patches can be encoded as if the others were absent."""
    mask_multiple: ClassVar[int] = 1
    """Tokens a side of the coarsest cell, which mixing should not cut."""

    image_size: Annotated[int, SIDES] = 224
    """Side of a global view in pixels; position parameters are made for it."""
    patch_size: Annotated[int, SIDES] = 16
    """Side of a patch in pixels."""
    dim: Annotated[int, WIDTHS] = 768
    """Width of a token."""
    depth: Annotated[int, DEPTHS] = 12
    """Number of blocks."""
    num_heads: Annotated[int, WIDTHS] = 12
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over dim; with swiglu that of the gate and of the value, each."""
    mlp: Mlp = "gelu"
    """Kind of MLP. gelu: two linear layers; gelu_tanh: the same with the tanh approximation of GELU
    (SigLIP 2); quick_gelu: with x sigmoid(1.702 x) (OpenAI's CLIP); swiglu: gated, with a third
    linear layer (DINOv2 giant, DINOv3's larger ones)."""
    qkv_bias: bool = True
    """Bias on queries, keys and values."""
    key_bias: bool = True
    """With qkv_bias, bias on keys as well; without, on queries and values alone (DINOv3)."""
    norm_eps: float = 1e-6
    """Number that every LayerNorm adds to the variance (DINOv3: 1e-5)."""
    class_token: bool = False
    """One learned token before the patches."""
    num_registers: Annotated[int, range(WIDTHS.stop)] = 0
    """Further learned tokens before the patches (registers)."""
    position: Position = "absolute"
    """Positions of patches. absolute: parameters, sine-cosine at the start, added to the patches.
    rotary: nothing is added, queries and keys are turned by their patch's place (RoPE in two
    dimensions, as DINOv3)."""
    layer_scale_init: float | None = None
    """Initial LayerScale of each branch; none: no LayerScale."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last block, rising linearly from 0 in the first."""
    drop_path_mode: DropPathMode = "mask"
    """Kind of stochastic depth. mask: drawn per sample, and branches are computed all the same;
    subset: a fixed share of every batch is dropped, and not computed (DINOv2), so that which ones
    are depends on how many ranks share the images of a step."""
    pre_norm: bool = False
    """LayerNorm before the first block, of patches and the tokens before them (CLIP)."""
    final_norm: bool = True
    """LayerNorm after the last block."""
    activation_checkpointing: Recompute = "none"
    """Activations that each block recomputes in the backward pass. selective: norms and GELU, which
    costs little; full: all of it, the least memory for about a third more compute."""
    attention: AttentionKernel = "auto"
    """Kernel of attention in training. auto: flash on a GPU, the fastest exact one on a CPU. flash:
    FlashAttention 2, part of torch. fa3, fa4: FlashAttention 3 or 4, if installed. cudnn: cuDNN's,
    not with --deterministic and not for views of any size. math: plain matrix products. A kernel
    that the device cannot run is refused."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from unmet(
            self,
            image_size=(
                self.image_size % self.patch_size == 0,
                f"a multiple of patch_size = {self.patch_size}",
            ),
            dim=(
                self.dim % self.num_heads == 0,
                f"a multiple of num_heads = {self.num_heads}",
            ),
            drop_path_rate=(0 <= self.drop_path_rate < 1, "0 <= rate < 1"),
            norm_eps=(0 < self.norm_eps < 1, "0 < eps < 1"),
        )
        if self.dim % 4:
            yield "dim", f"expected a multiple of 4 (sine-cosine), got {self.dim}"
        if self.position == "rotary" and self.dim // self.num_heads % 4:
            yield (
                "num_heads",
                "expected heads of a multiple of 4 features with position = rotary, got "
                f"{self.dim} / {self.num_heads}",
            )
        yield from mlp_ratio_conflicts(self.mlp_ratio)

    @property
    def num_layers(self) -> int:
        """Return the number of layers with two residual branches each."""
        return self.depth

    def drop_path(self, layer: int) -> float:
        """Return the rate of stochastic depth of that block."""
        return self.drop_path_rate * layer / max(self.depth - 1, 1)

    @property
    def grid(self) -> int:
        """Return the patches along a side of a global view."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Return the patches of a global view."""
        return self.grid**2

    @property
    def num_prefix(self) -> int:
        """Return the tokens before the patches: class token and registers."""
        return int(self.class_token) + self.num_registers

    @property
    def summary_dim(self) -> int:
        """Return the width of the patch tokens, which the objective's global heads read."""
        return self.dim

    @property
    def size_multiple(self) -> int:
        """Return the number of pixels that the sides of an image are multiples of."""
        return self.patch_size

    def encoder_conflicts(self) -> Iterator[Conflict]:
        """Yield nothing: every ViTConfig describes an encoder without head, for pre-training."""
        return iter(())


def vit_demo(**overrides: Any) -> ViTConfig:
    """Return a ViT of 0.8 M parameters for drawings of 64 pixels; keywords replace fields."""
    cfg = ViTConfig(image_size=64, patch_size=8, dim=128, depth=4, num_heads=4)
    return replace(cfg, **overrides)


def vit_ti(**overrides: Any) -> ViTConfig:
    """Return ViT-Ti/16: 5.5 M parameters; keywords replace fields."""
    return replace(ViTConfig(dim=192, num_heads=3), **overrides)


def vit_s(**overrides: Any) -> ViTConfig:
    """Return ViT-S/16: 22 M parameters; keywords replace fields."""
    return replace(ViTConfig(dim=384, num_heads=6), **overrides)


def vit_b(**overrides: Any) -> ViTConfig:
    """Return ViT-B/16: 86 M parameters; keywords replace fields."""
    return replace(ViTConfig(dim=768, num_heads=12), **overrides)


def vit_l(**overrides: Any) -> ViTConfig:
    """Return ViT-L/16: 303 M parameters; keywords replace fields."""
    return replace(ViTConfig(dim=1024, depth=24, num_heads=16), **overrides)


def vit_h(**overrides: Any) -> ViTConfig:
    """Return ViT-H/14: 631 M parameters; keywords replace fields."""
    return replace(ViTConfig(patch_size=14, dim=1280, depth=32, num_heads=16), **overrides)


def clip_b32(**overrides: Any) -> ViTConfig:
    """Return CLIP's ViT-B/32: 88 M parameters; keywords replace fields."""
    return replace(_clip(vit_b(patch_size=32)), **overrides)


def clip_b16(**overrides: Any) -> ViTConfig:
    """Return CLIP's ViT-B/16: 86 M parameters; keywords replace fields."""
    return replace(_clip(vit_b()), **overrides)


def clip_l14(**overrides: Any) -> ViTConfig:
    """Return CLIP's ViT-L/14: 303 M parameters; keywords replace fields."""
    return replace(_clip(vit_l(patch_size=14)), **overrides)


def clip_h14(**overrides: Any) -> ViTConfig:
    """Return OpenCLIP's ViT-H/14: 631 M parameters; keywords replace fields."""
    return replace(_clip(vit_h()), **overrides)


def dinov2_s(**overrides: Any) -> ViTConfig:
    """Return DINOv2's ViT-S/14 with registers: 22 M parameters; keywords replace fields."""
    return replace(_dinov2(vit_s()), **overrides)


def dinov2_b(**overrides: Any) -> ViTConfig:
    """Return DINOv2's ViT-B/14 with registers: 86 M parameters; keywords replace fields."""
    return replace(_dinov2(vit_b()), **overrides)


def dinov2_l(**overrides: Any) -> ViTConfig:
    """Return DINOv2's ViT-L/14 with registers: 304 M parameters; keywords replace fields."""
    return replace(_dinov2(vit_l()), **overrides)


def dinov2_g(**overrides: Any) -> ViTConfig:
    """Return DINOv2's ViT-g/14 with registers: 1.1 B parameters; keywords replace fields."""
    giant = ViTConfig(dim=1536, depth=40, num_heads=24, mlp="swiglu", mlp_ratio=8 / 3)
    return replace(_dinov2(giant), **overrides)


def dinov3_s(**overrides: Any) -> ViTConfig:
    """Return DINOv3's ViT-S/16: 22 M parameters; keywords replace fields."""
    return replace(_dinov3(vit_s()), **overrides)


def dinov3_s_plus(**overrides: Any) -> ViTConfig:
    """Return DINOv3's ViT-S+/16: 29 M parameters; keywords replace fields."""
    return replace(_dinov3(vit_s(mlp="swiglu")), **overrides)


def dinov3_b(**overrides: Any) -> ViTConfig:
    """Return DINOv3's ViT-B/16: 86 M parameters; keywords replace fields."""
    return replace(_dinov3(vit_b()), **overrides)


def dinov3_l(**overrides: Any) -> ViTConfig:
    """Return DINOv3's ViT-L/16: 303 M parameters; keywords replace fields."""
    return replace(_dinov3(vit_l()), **overrides)


def dinov3_h_plus(**overrides: Any) -> ViTConfig:
    """Return DINOv3's ViT-H+/16: 841 M parameters; keywords replace fields."""
    huge = ViTConfig(dim=1280, depth=32, num_heads=20, mlp="swiglu")
    return replace(_dinov3(huge), **overrides)


def dinov3_7b(**overrides: Any) -> ViTConfig:
    """Return DINOv3's ViT-7B/16: 6.7 B parameters; keywords replace fields."""
    largest = ViTConfig(
        dim=4096, depth=40, num_heads=32, mlp="swiglu", mlp_ratio=2.0, qkv_bias=False
    )
    return replace(_dinov3(largest), **overrides)


def _clip(cfg: ViTConfig) -> ViTConfig:
    """Return the config with what CLIP (arXiv 2103.00020) has at every size, with the exact GELU.

    OpenAI's own weights were trained with quick_gelu.
    """
    return replace(cfg, class_token=True, pre_norm=True, norm_eps=1e-5)


def _dinov2(cfg: ViTConfig) -> ViTConfig:
    """Return the config with what DINOv2 (arXiv 2304.07193, 2309.16588) has at every size."""
    return replace(cfg, patch_size=14, class_token=True, num_registers=4, layer_scale_init=1e-5)


def _dinov3(cfg: ViTConfig) -> ViTConfig:
    """Return the config with what DINOv3 (arXiv 2508.10104) has at every size."""
    return replace(
        cfg,
        class_token=True,
        num_registers=4,
        position="rotary",
        layer_scale_init=1e-5,
        norm_eps=1e-5,
        key_bias=False,
    )
