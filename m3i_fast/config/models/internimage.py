"""Sizes and options of InternImage, and the published ones by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from m3i_fast.config.fields import (
    DEPTHS,
    ROWS,
    SIDES,
    WIDTHS,
    Checked,
    Conflict,
    DropPathMode,
    Recompute,
    mlp_ratio_conflicts,
    unmet,
)

TOKEN_STRIDE = 16  # pixels a side of a dense token's cell
COARSEST_STRIDE = 32  # pixels a side of a cell of the last stage

Four = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class InternImageConfig(Checked):
    """Size an InternImage and choose its options; by default InternImage-T for ImageNet-1K."""

    encodes_cells_alone: ClassVar[bool] = False
    """A convolution sees the whole input: no cell can be encoded as if the others were absent."""
    mask_multiple: ClassVar[int] = COARSEST_STRIDE // TOKEN_STRIDE
    """Tokens a side of the coarsest cell, which mixing should not cut."""

    image_size: Annotated[int, SIDES] = 224
    """Side of a global view in pixels, when training; other sizes work as well."""
    channels: Annotated[int, WIDTHS] = 64
    """Width of the first stage; it doubles from stage to stage."""
    depths: Annotated[Four, DEPTHS] = (4, 4, 18, 4)
    """Number of layers of each stage."""
    groups: Annotated[Four, WIDTHS] = (4, 8, 16, 32)
    """Groups of the deformable convolution in each stage; each has its own offsets."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the stage's."""
    num_classes: Annotated[int, ROWS] = 1000
    """Outputs of the classification head; 0: no head."""
    drop_path_rate: float = 0.0
    """Stochastic depth of the last layer, rising linearly from 0 in the first."""
    layer_scale: float | None = None
    """Initial scale of each branch; none: no scale."""
    offset_scale: float = 1.0
    """Factor of the sampling grid and of the learned offsets."""
    post_norm: bool = False
    """Normalise a branch's output instead of its input."""
    dw_kernel_size: Annotated[int | None, range(1, 256)] = None
    """Side of the depthwise convolution that offsets and masks are computed from; none: 3."""
    use_clip_projector: bool = False
    """Dense tokens and attention pooling in the place of the convolutional head."""
    level2_post_norm: bool = False
    """Further norms in the third stage, after the layers in level2_post_norm_block_ids."""
    level2_post_norm_block_ids: Annotated[tuple[int, ...] | None, range(DEPTHS.stop)] = None
    """Layers of the third stage, counted from 0, that level2_post_norm puts a norm after."""
    res_post_norm: bool = False
    """Normalise a branch's output as well as its input."""
    center_feature_scale: bool = False
    """A learned gate a group between the samples and the cell itself."""
    token_dim: Annotated[int, WIDTHS] = 1024
    """Width of a dense token, with use_clip_projector."""
    pool_heads: Annotated[int, WIDTHS] = 16
    """Heads of the attention pooling."""
    pooled_dim: Annotated[int, WIDTHS] = 768
    """Width of the attention-pooled vector."""
    drop_path_mode: DropPathMode = "mask"
    """Kind of stochastic depth. mask: drawn per sample, and branches are computed all the same;
    subset: a fixed share of every batch is dropped, and not computed (DINOv2), so that which ones
    are depends on how many ranks share the images of a step."""
    activation_checkpointing: Recompute = "none"
    """Activations that each layer recomputes in the backward pass. selective: norms and GELU, which
    costs little; full: all of it, the least memory for about a third more compute."""

    def conflicts(self) -> Iterator[Conflict]:
        wrong = [name for name in ("depths", "groups") if len(getattr(self, name)) != 4]
        if wrong:  # what follows counts on four stages
            yield from (
                (name, f"expected four numbers, got {getattr(self, name)}") for name in wrong
            )
            return
        side = self.context_size
        fits_heads = self.token_dim % self.pool_heads == 0
        fits_stride = not self.use_clip_projector or self.image_size % COARSEST_STRIDE == 0
        yield from unmet(
            self,
            channels=(self.channels % 2 == 0, "an even number"),
            drop_path_rate=(0 <= self.drop_path_rate < 1, "0 <= rate < 1"),
            dw_kernel_size=(side >= 1 and side % 2 == 1, "an odd number"),
            token_dim=(fits_heads, f"a multiple of {self.pool_heads} heads"),
            image_size=(fits_stride, f"a multiple of {COARSEST_STRIDE}"),
        )
        for stage, groups in enumerate(self.groups):
            width = self.channels * 2**stage
            if width % groups:
                yield f"groups[{stage}]", f"expected a divisor of {width}, got {groups}"
        yield from mlp_ratio_conflicts(self.mlp_ratio)
        yield from self._norm_conflicts()

    def _norm_conflicts(self) -> Iterator[Conflict]:
        if self.res_post_norm:  # the official code ignores it, or these, silently
            yield from unmet(
                self,
                post_norm=(not self.post_norm, "False with res_post_norm"),
                layer_scale=(self.layer_scale is None, "None with res_post_norm"),
            )
        ids = self.level2_post_norm_block_ids or ()
        inside = all(0 <= i < self.depths[2] for i in ids) and len(set(ids)) == len(ids)
        if not inside or bool(ids) != self.level2_post_norm:
            expected = f"distinct layers of {self.depths[2]}, with level2_post_norm only"
            yield "level2_post_norm_block_ids", f"expected {expected}, got {ids}"

    @property
    def num_layers(self) -> int:
        """Return the number of layers with two residual branches each, of all stages."""
        return sum(self.depths)

    def drop_path(self, layer: int) -> float:
        """Return the rate of stochastic depth of that layer, counted over all stages."""
        return self.drop_path_rate * layer / max(sum(self.depths) - 1, 1)

    @property
    def context_size(self) -> int:
        """Return dw_kernel_size, or the side of the deformable kernel in its place."""
        return 3 if self.dw_kernel_size is None else self.dw_kernel_size

    @property
    def grid(self) -> int:
        """Return the dense tokens along a side of a global view."""
        return self.image_size // TOKEN_STRIDE

    @property
    def dim(self) -> int:
        """Return the width of a dense token."""
        return self.token_dim

    @property
    def summary_dim(self) -> int:
        """Return the width of the pooled vector, which the objective's global heads read."""
        return self.pooled_dim

    @property
    def size_multiple(self) -> int:
        """Return the number of pixels that the sides of an image are multiples of."""
        return COARSEST_STRIDE

    def encoder_conflicts(self) -> Iterator[Conflict]:
        """Yield what keeps this from being an encoder without head, for pre-training."""
        expected = {
            "use_clip_projector": (self.use_clip_projector, "True to train an encoder"),
            "num_classes": (self.num_classes == 0, "0 to train an encoder; terms have heads"),
        }
        for name, told in unmet(self, **expected):
            yield f"vision.{name}", told


def internimage_demo(**overrides: Any) -> InternImageConfig:
    """Return an InternImage of 1.8 M parameters for drawings on a CPU; keywords replace fields."""
    cfg = InternImageConfig(
        image_size=128,
        channels=32,
        depths=(1, 1, 2, 1),
        groups=(2, 4, 8, 16),
        num_classes=0,
        use_clip_projector=True,
        token_dim=128,
        pool_heads=4,
        pooled_dim=128,
    )
    return replace(cfg, **overrides)


def internimage_t(**overrides: Any) -> InternImageConfig:
    """Return InternImage-T: 30 M parameters; keywords replace fields."""
    return replace(InternImageConfig(), **overrides)


def internimage_s(**overrides: Any) -> InternImageConfig:
    """Return InternImage-S: 50 M parameters; keywords replace fields."""
    return replace(_post_norm(80, (4, 4, 21, 4), 5), **overrides)


def internimage_b(**overrides: Any) -> InternImageConfig:
    """Return InternImage-B: 97 M parameters; keywords replace fields."""
    return replace(_post_norm(112, (4, 4, 21, 4), 7), **overrides)


def internimage_l(**overrides: Any) -> InternImageConfig:
    """Return InternImage-L: 223 M parameters; keywords replace fields."""
    return replace(_post_norm(160, (5, 5, 22, 5), 10, offset_scale=2.0), **overrides)


def internimage_xl(**overrides: Any) -> InternImageConfig:
    """Return InternImage-XL: 335 M parameters; keywords replace fields."""
    return replace(_post_norm(192, (5, 5, 24, 5), 12, offset_scale=2.0), **overrides)


def internimage_h(**overrides: Any) -> InternImageConfig:
    """Return InternImage-H: 1.09 B parameters; keywords replace fields."""
    return replace(_projecting(320, (6, 6, 32, 6), 10, res_post_norm=True), **overrides)


def internimage_g(**overrides: Any) -> InternImageConfig:
    """Return InternImage-G: 3.08 B parameters; keywords replace fields."""
    return replace(_projecting(512, (2, 2, 48, 4), 16, post_norm=True), **overrides)


def _post_norm(
    channels: int, depths: Four, groups: int, *, offset_scale: float = 1.0
) -> InternImageConfig:
    return InternImageConfig(
        channels=channels,
        depths=depths,
        groups=_doubling(groups),
        layer_scale=1e-5,
        post_norm=True,
        offset_scale=offset_scale,
    )


def _projecting(channels: int, depths: Four, groups: int, **norms: Any) -> InternImageConfig:
    return InternImageConfig(
        channels=channels,
        depths=depths,
        groups=_doubling(groups),
        dw_kernel_size=5,
        use_clip_projector=True,
        level2_post_norm=True,
        level2_post_norm_block_ids=tuple(range(5, depths[2], 6)),
        center_feature_scale=True,
        **norms,
    )


def _doubling(first: int) -> Four:
    return first, 2 * first, 4 * first, 8 * first
