"""Floating-point operations of the encoders, in closed form from their configs.

What is counted, `m3i_fast.config.objective.flops` says; `torch.utils.flop_counter` counts the same.
DCNv3's sampling, which that counter does not see, is a function of its own.

Letters: B images, T tokens of each, D width, n cells of a map, c its channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from m3i_fast.config.fields import Mlp
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.flops import NONE, Flops, LayerFlops, linear
from m3i_fast.config.objective.heads import CaptionerConfig
from m3i_fast.models.internimage.deformable import NUM_POINTS
from m3i_fast.models.internimage.model import HEAD_RATIO
from m3i_fast.models.transformer.drop_path import num_kept
from m3i_fast.models.transformer.layers import fc1_features

SAMPLING_PER_POINT = 5  # InternImage's convention: 5 n k c for n cells, k points, c channels


def layer(rows: int, dim_in: int, dim_out: int, *, input_grad: bool = True) -> Flops:
    """Count a linear layer of a block, which FP8 may run."""
    flops = linear(rows, dim_in, dim_out, input_grad=input_grad)
    row = LayerFlops(dim_in, dim_out, flops.forward, flops.backward)
    return replace(flops, layers=(row,))


def convolution(
    cells: int, dim_in: int, dim_out: int, side: int, *, groups: int = 1, input_grad: bool = True
) -> Flops:
    """Count a convolution with square kernels.

    cells: those of the output, over all images. side: of the kernel.
    """
    forward = 2 * cells * side**2 * dim_in * dim_out // groups
    return Flops(forward, forward * (1 + input_grad))


def attention(batch: int, queries: int, keys: int, dim: int) -> Flops:
    """Count scores, their product with the values, and the scores again for the gradients."""
    product = 2 * batch * queries * keys * dim
    return Flops(2 * product, 4 * product, product)


def block(
    batch: int,
    tokens: int,
    dim: int,
    *,
    mlp_ratio: float,
    mlp: Mlp = "gelu",
    num_last: int | None = None,
) -> Flops:
    """Count a Transformer block: 24 T D^2 + 4 T^2 D forward per image for mlp_ratio 4 and GELU.

    num_last: tokens per image that go on after attention, all of them by default.
    """
    rows = batch * (tokens if num_last is None else num_last)
    hidden = int(dim * mlp_ratio)
    return (
        layer(batch * tokens, dim, 3 * dim)
        + attention(batch, tokens, tokens, dim)
        + layer(rows, dim, dim)
        + layer(rows, dim, fc1_features(hidden, mlp))
        + layer(rows, hidden, dim)
    )


# ---- Vision Transformer, text --------------------------------------------------------------------


def vit_embed(cfg: ViTConfig, num_images: int, image_size: int | None = None) -> Flops:
    """Count the patch embedding of whole images."""
    num_patches = ((image_size or cfg.image_size) // cfg.patch_size) ** 2
    return linear(num_images * num_patches, 3 * cfg.patch_size**2, cfg.dim, input_grad=False)


def vit_encode(cfg: ViTConfig, num_images: int, num_tokens: int) -> Flops:
    """Count the blocks in training, over this many patch tokens per image and the prefix."""
    tokens = num_tokens + cfg.num_prefix
    flops = NONE
    for number in range(cfg.depth):
        images = _num_computed(cfg, number, num_images)
        flops += block(images, tokens, cfg.dim, mlp_ratio=cfg.mlp_ratio, mlp=cfg.mlp)
    if cfg.activation_checkpointing != "full":
        return flops
    last = linear(num_images * tokens, int(cfg.dim * cfg.mlp_ratio), cfg.dim).forward
    reads_branch = cfg.layer_scale_init is not None
    return flops.recomputed(
        but=last * _num_unread(cfg.depth, cfg.drop_path_rate, reads_branch=reads_branch)
    )


def vit(cfg: ViTConfig, num_images: int = 1, image_size: int | None = None) -> Flops:
    """Count a ViT in training on whole images."""
    size = image_size or cfg.image_size
    tokens = (size // cfg.patch_size) ** 2
    return vit_embed(cfg, num_images, size) + vit_encode(cfg, num_images, tokens)


def vit_packed(cfg: ViTConfig, lengths: Sequence[int] | Counter[int]) -> Flops:
    """Count a ViT in training on whole pictures that are packed (`ViT.encode_pictures`).

    lengths: patches of each picture, or how many pictures have so many. Its products are of these
    tokens alone, and attention of each picture's with one another. Positions that are resampled
    from a table are a product of their own, of which the table, and not the weights of its cells,
    has a gradient.
    """
    pictures = Counter(lengths)
    total = sum(length * count for length, count in pictures.items())
    flops = linear(total, 3 * cfg.patch_size**2, cfg.dim, input_grad=False)
    if cfg.position == "absolute":
        flops += linear(total, cfg.num_patches, cfg.dim, input_grad=False)
    for length, count in pictures.items():
        flops += vit_encode(cfg, count, length)
    return flops


def text(cfg: TextConfig, num_captions: int = 1) -> Flops:
    """Count the text encoder on captions of the full context length, padding included."""
    one = block(num_captions, cfg.context_length, cfg.dim, mlp_ratio=cfg.mlp_ratio)
    if cfg.activation_checkpointing == "full":
        rows = num_captions * cfg.context_length
        one = one.recomputed(but=linear(rows, int(cfg.dim * cfg.mlp_ratio), cfg.dim).forward)
    return one * cfg.depth + linear(num_captions, cfg.dim, cfg.embed_dim)


def text_decoder(
    cfg: CaptionerConfig,
    *,
    num_images: int,
    num_tokens: int,
    num_cells: int,
    input_dim: int,
    input_grad: bool = True,
    num_texts: int = 1,
) -> Flops:
    """Count the decoder of captions: a block over the tokens, and attention to the cells.

    num_tokens: those that are predicted, of each text. num_texts: of each image, that read the same
    cells. num_cells, input_dim: of what is read, which takes a gradient with input_grad.
    """
    texts, cells = num_images * num_texts, num_images * num_cells
    dim, rows = cfg.dim, texts * num_tokens
    one = (
        block(texts, num_tokens, dim, mlp_ratio=cfg.mlp_ratio)
        + layer(rows, dim, dim) * 2
        + layer(cells, input_dim, 2 * dim, input_grad=input_grad)
        + attention(num_images, num_texts * num_tokens, num_cells, dim)
    )
    if cfg.activation_checkpointing == "full":
        one = one.recomputed(but=linear(rows, int(dim * cfg.mlp_ratio), dim).forward)
    return one * cfg.depth


def _num_computed(cfg: ViTConfig | InternImageConfig, layer: int, num_images: int) -> int:
    """Return how many images go through that layer's branches in training."""
    if cfg.drop_path_mode == "mask":
        return num_images
    return num_kept(num_images, cfg.drop_path(layer))


def _num_unread(depth: int, drop_path_rate: float, *, reads_branch: bool) -> int:
    """Return in how many layers recomputation ends before the MLP's last product.

    There nothing saves the MLP's output. A scale or a norm on the branch saves it; stochastic
    depth, of which the first layer has none, saves its draw after it.
    """
    if reads_branch:
        return 0
    return 1 if drop_path_rate else depth


# ---- InternImage ---------------------------------------------------------------------------------


def internimage(
    cfg: InternImageConfig, num_images: int = 1, image_size: int | None = None
) -> Flops:
    """Count an InternImage without its sampling.

    Up to dense tokens with use_clip_projector, else the whole classifier.
    """
    side = image_size or cfg.image_size
    half, cells = -(-side // 2), _cells(num_images, side)
    flops = convolution(num_images * half**2, 3, cfg.channels // 2, 3, input_grad=False)
    flops += convolution(cells[0], cfg.channels // 2, cfg.channels, 3)
    for stage in range(4):
        width = cfg.channels * 2**stage
        flops += _layers(cfg, stage, num_images, cells[stage])
        if stage < 3:
            flops += convolution(cells[stage + 1], width, 2 * width, 3)
    width = cfg.channels * 2**3
    if cfg.use_clip_projector:
        flops += linear(cells[3], width, 4 * cfg.token_dim)
        return flops + linear(cells[2], width // 2, cfg.token_dim)
    head_dim = int(width * HEAD_RATIO)
    return flops + linear(cells[3], width, head_dim) + linear(num_images, head_dim, cfg.num_classes)


def internimage_sampling(
    cfg: InternImageConfig, num_images: int = 1, image_size: int | None = None
) -> Flops:
    """Count DCNv3's bilinear samples: 5 n k c a layer forward, and twice that backward, assumed."""
    flops = NONE
    for stage, cells in enumerate(_cells(1, image_size or cfg.image_size)):
        points = SAMPLING_PER_POINT * NUM_POINTS * cells * cfg.channels * 2**stage
        one = Flops(points, 2 * points)
        one = one.recomputed() if cfg.activation_checkpointing == "full" else one
        flops += one * sum(_computed(cfg, stage, num_images))
    return flops


def internimage_pool(cfg: InternImageConfig, num_images: int, num_tokens: int) -> Flops:
    """Count attention pooling by one query over this many tokens per image."""
    dim, rows = cfg.token_dim, num_images * num_tokens
    return (
        linear(num_images, dim, dim)
        + linear(rows, dim, dim) * 2
        + attention(num_images, 1, num_tokens, dim)
        + linear(num_images, dim, cfg.pooled_dim)
    )


def _cells(num_images: int, side: int) -> list[int]:
    """Return the cells of each stage's map over all images; sides are rounded up."""
    cells = []
    side = -(-side // 2)
    for _ in range(4):
        side = -(-side // 2)
        cells.append(num_images * side**2)
    return cells


def _computed(cfg: InternImageConfig, stage: int, num_images: int) -> list[int]:
    """Return how many images go through each layer of that stage."""
    first = sum(cfg.depths[:stage])
    layers = range(first, first + cfg.depths[stage])
    return [_num_computed(cfg, layer, num_images) for layer in layers]


def _layers(cfg: InternImageConfig, stage: int, num_images: int, cells: int) -> Flops:
    """Count all layers of one stage; cells: of its map over all images."""
    width, groups, depth = cfg.channels * 2**stage, cfg.groups[stage], cfg.depths[stage]
    hidden = int(width * cfg.mlp_ratio)
    outputs = groups * (3 * NUM_POINTS + cfg.center_feature_scale)  # offsets, weights, gates
    flops = NONE
    for images in _computed(cfg, stage, num_images):
        rows = cells // num_images * images
        flops += layer(rows, width, width) * 2
        flops += convolution(rows, width, width, cfg.context_size, groups=width)
        flops += linear(rows, width, outputs)
        flops += layer(rows, width, hidden)
        flops += layer(rows, hidden, width)
    if cfg.activation_checkpointing != "full":
        return flops
    last = linear(cells, hidden, width)  # of layers that drop nothing
    reads_branch = cfg.post_norm or cfg.res_post_norm or cfg.layer_scale is not None
    unread = _num_unread(depth, cfg.drop_path_rate, reads_branch=reads_branch)
    if stage and cfg.drop_path_rate:  # the network's first layer alone drops nothing
        unread = 0
    return flops.recomputed(but=last.forward * unread)
