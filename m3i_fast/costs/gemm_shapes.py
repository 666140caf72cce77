"""Rows of every product of a step, and the batches of a rank that mixing and FP8 allow.

FP8 asks that the rows of a product (tokens over all images) are a multiple of 16 with one scale a
tensor, 32 for MXFP8 and 128 for blocks of 128: the gradient of a weight sums over them. A batch
that is a multiple of it fits whatever the number of tokens, so others are refused, not padded,
which would copy every activation. The counts that are no multiple of the batch are those of the
inputs that dense terms ask (`mixing.dense_fraction`) and of the images that stochastic depth by
subset keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from m3i_fast.config import TrainConfig
from m3i_fast.config.fields import Mlp
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.flops import Product
from m3i_fast.costs.packed_pictures import PackedPictures
from m3i_fast.costs.step_flops import counts_of
from m3i_fast.costs.step_sizes import StepCounts
from m3i_fast.models.transformer.drop_path import num_kept
from m3i_fast.models.transformer.layers import fc1_features
from m3i_fast.models.transformer.wide_layers import is_wide
from m3i_fast.objectives.step_context import target_rows

ALIGNMENT = {"bf16": 1, "fp8_current": 16, "fp8_delayed": 16, "mxfp8": 32, "fp8_block": 128}
FP8 = tuple(recipe for recipe in ALIGNMENT if recipe != "bf16")


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """Describe a call of one part of the model, of images * tokens rows."""

    images: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class GemmShapes:
    """Hold the shapes of the layers that FP8 may run in one rank's step."""

    batch_size: int
    batch_multiple: int
    """Images that share an input, of which a batch is a multiple."""
    products: Mapping[str, tuple[Product, ...]]
    """Sides of the products by part of the model, wide and narrow ones."""
    rows: Callable[[int], Iterator[tuple[str, int]]]
    """Yields (part, rows of a call) of a batch size, all that occur in the run."""
    max_calls: int = 1
    """Most calls of one module in a step."""
    min_dim: int
    """Least side of a product that FP8 runs; narrower ones stay in BF16."""

    @property
    def wide(self) -> dict[str, tuple[Product, ...]]:
        """Return the products that FP8 runs, by part; parts without any are left out."""
        wide = {
            part: tuple(each for each in products if is_wide(*each, self.min_dim))
            for part, products in self.products.items()
        }
        return {part: products for part, products in wide.items() if products}

    def misfit(self, batch_size: int, alignment: int) -> str:
        """Say why a batch is not legal; return an empty text where it is."""
        if batch_size % self.batch_multiple:
            return f"{batch_size} images do not divide into inputs of {self.batch_multiple}"
        wide = self.wide if alignment > 1 else {}
        for part, rows in self.rows(batch_size) if wide else ():
            if part in wide and rows % alignment:
                return (
                    f"{part}: {rows} tokens, {rows % alignment} more than a multiple of {alignment}"
                )
        return ""

    def nearest(self, alignment: int) -> tuple[int | None, int | None]:
        """Return the nearest legal batches, one no larger and one no smaller, or None."""
        size, step = self.batch_size, self.batch_multiple
        most = size + 4 * step * alignment  # rows are linear in the batch, but for rounding
        down, up = range(size - size % step, 0, -step), range(-(-size // step) * step, most, step)
        below, above = (
            next((batch for batch in reach if not self.misfit(batch, alignment)), None)
            for reach in (down, up)
        )
        return below, above


@dataclass(frozen=True, kw_only=True, slots=True)
class LegalBatch:
    """Say whether a batch is legal for one recipe of arithmetic, and which ones near it are."""

    recipe: str
    alignment: int
    is_legal: bool
    reason: str
    """What does not fit; empty where the batch is legal."""
    below: int | None
    """Nearest legal batch that is no larger."""
    above: int | None


def legal_batches(cfg: TrainConfig) -> list[LegalBatch]:
    """Return one row per recipe of arithmetic, for the batch of a rank."""
    shapes, batches = gemm_shapes(cfg), []
    for recipe, alignment in ALIGNMENT.items():
        reason, near = shapes.misfit(shapes.batch_size, alignment), shapes.nearest(alignment)
        if alignment > 1 and not shapes.wide:
            reason, near = too_narrow(shapes), (None, None)
        batches.append(
            LegalBatch(
                recipe=recipe,
                alignment=alignment,
                is_legal=not reason,
                reason=reason,
                below=near[0],
                above=near[1],
            )
        )
    return batches


def too_narrow(shapes: GemmShapes) -> str:
    """Say why no product of the model runs in FP8, and what would change it."""
    aligned = {each for products in shapes.products.values() for each in products}
    aligned = {each for each in aligned if is_wide(*each, 1)}
    if not aligned:
        return "no product has sides that are multiples of 16"
    dim_in, dim_out = max(aligned, key=min)
    return (
        f"no product is as wide as fp8_min_dim = {shapes.min_dim}, the widest is {dim_in} x "
        f"{dim_out}: --fp8-min-dim {min(dim_in, dim_out)} takes it"
    )


def gemm_shapes(cfg: TrainConfig) -> GemmShapes:
    """Return the shapes that the choice of arithmetic depends on."""
    counts, chunk = counts_of(cfg), cfg.parallel.chunk
    stride = cfg.vision.size_multiple
    progress = list(_shown(cfg, counts))

    def rows(batch_size: int) -> Iterator[tuple[str, int]]:
        if cfg.data.any_shape:  # packed rows are filled up, and captions are refused
            return
        for at in progress:
            passes = _passes(replace(counts, batch_size=batch_size, progress=at), stride)
            for part, each in passes.items():
                for images in _chunks(each.images, chunk):
                    for kept in _kept(cfg.vision, part, images):
                        yield part, kept * each.tokens

    passes = _passes(counts, stride)
    return GemmShapes(
        batch_size=counts.batch_size,
        batch_multiple=cfg.objective.mixing.images_per_input,
        products={part: _products(cfg, part) for part in passes},
        rows=rows,
        max_calls=_max_calls(cfg, passes),
        min_dim=cfg.fp8_min_dim,
    )


def token_rows(counts: StepCounts) -> dict[str, int]:
    """Return the tokens of all images in each part."""
    of_squares = counts if counts.pictures is None else counts.of_mean()
    passes = _passes(of_squares, counts.vision.image_size // counts.vision.grid)
    rows = {part: each.images * each.tokens for part, each in passes.items()}
    if counts.pictures is not None:
        rows |= _packed_rows(counts, counts.pictures)
        rows.pop("local views", None)  # in one pass with the others
    return rows


def _packed_rows(counts: StepCounts, pictures: PackedPictures) -> dict[str, int]:
    """Return the tokens of the encoders' passes over views of any shape."""
    assert isinstance(counts.vision, ViTConfig)  # any_shape_conflicts
    prefix = counts.vision.num_prefix
    rows = {"encoder": pictures.tokens_of(counts.encoded_views, prefix, counts.shown)}
    names = {"momentum": "target encoder", "snapshot": "snapshot", "frozen": "frozen teacher"}
    for (encoder, view), asked in target_rows(counts.objective.active_terms).items():
        vision = counts.encoder_of(encoder)
        assert isinstance(vision, ViTConfig)  # any_shape_conflicts
        name = names[encoder.partition(":")[0]]
        tokens = pictures.tokens_of([view], vision.num_prefix)
        share = counts.num_asked(asked) / counts.num_asked("every")
        rows[name] = rows.get(name, 0) + round(share * tokens)
    return rows


def _passes(counts: StepCounts, stride: int) -> dict[str, ModuleCall]:
    """Return the calls of each part; `stride`: pixels a side of an encoder's smallest cell."""
    passes = _encoder_passes(counts, stride)
    for term in counts.objective.active_terms:
        if term.target == "caption":
            passes["text encoder"] = ModuleCall(counts.batch_size, counts.text.context_length)
        if term.predictor == "captioner":
            images, tokens = counts.num_images, counts.num_caption_tokens
            if term.kind.column == "regions":
                tokens = counts.num_regions * counts.num_region_tokens
            passes[f"captioner of {term.name}"] = ModuleCall(images, tokens)
            passes[f"cells read by {term.name}"] = ModuleCall(images, counts.num_tokens)
        if term.predictor == "decoder":
            asked, queries = counts.num_asked(term.asked), counts.num_queries(term)
            local = counts.num_local if term.view == "other" else 0
            calls = {"": (asked, counts.num_own)}
            calls[", local views"] = local * asked, counts.num_local_cells
            for view, (images, own) in calls.items():
                passes[f"decoder of {term.name}{view}"] = ModuleCall(images, own + queries)
                passes[f"cells asked by {term.name}{view}"] = ModuleCall(images, queries)
    return {part: each for part, each in passes.items() if each.images * each.tokens}


def _encoder_passes(counts: StepCounts, stride: int) -> dict[str, ModuleCall]:
    vision = counts.vision
    prefix = vision.num_prefix if isinstance(vision, ViTConfig) else 0
    whole = (vision.image_size // stride) ** 2 + prefix
    own = ModuleCall(counts.num_inputs * counts.num_views, whole)
    if counts.objective.mixing.encodes_alone:
        own = ModuleCall(counts.num_images * counts.num_views, counts.num_own + prefix)
    asked = dict.fromkeys(("momentum", "snapshot", "frozen"), 0)
    for (encoder, _), rows in target_rows(counts.objective.active_terms).items():
        asked[encoder.partition(":")[0]] += counts.num_asked(rows)
    local = (counts.local_size // stride) ** 2 + prefix
    return {
        "encoder": own,
        "target encoder": ModuleCall(asked["momentum"], whole),
        "snapshot": ModuleCall(asked["snapshot"], whole),
        "frozen teacher": ModuleCall(asked["frozen"], whole),
        "local views": ModuleCall(counts.num_local * counts.batch_size, local),
    }


def _products(cfg: TrainConfig, part: str) -> tuple[Product, ...]:
    """Return the products of the blocks of each part.

    Heads, embeddings and a frozen teacher never run in FP8.
    """
    match part:
        case "text encoder":
            return _block(cfg.text.dim, cfg.text.mlp_ratio)
        case "encoder" | "target encoder" | "snapshot" | "local views":
            return _vision_products(cfg.vision)
        case "frozen teacher":
            return ()
        case _ if part.startswith("captioner of "):
            sized = cfg.objective.captioner
            return _block(sized.dim, sized.mlp_ratio)
        case _ if part.startswith("cells read by "):
            return ((cfg.vision.dim, 2 * cfg.objective.captioner.dim),)
        case _:
            return _block(cfg.objective.decoder.dim, cfg.objective.decoder.mlp_ratio)


def _vision_products(cfg: VisionConfig) -> tuple[Product, ...]:
    if isinstance(cfg, ViTConfig):
        return _block(cfg.dim, cfg.mlp_ratio, cfg.mlp)
    return tuple(each for stage in range(4) for each in _stage(cfg, cfg.channels * 2**stage))


def _block(dim: int, mlp_ratio: float, mlp: Mlp = "gelu") -> tuple[Product, ...]:
    hidden = int(dim * mlp_ratio)
    return (dim, 3 * dim), (dim, dim), (dim, fc1_features(hidden, mlp)), (hidden, dim)


def _stage(cfg: InternImageConfig, width: int) -> tuple[Product, ...]:
    hidden = int(width * cfg.mlp_ratio)
    return (width, width), (width, hidden), (hidden, width)


def _chunks(images: int, chunk: int) -> set[int]:
    """Return the images of each call, which `parallel.chunk` splits as evenly as possible."""
    count = -(-images // chunk) if chunk else 1
    return {images // count, -(-images // count)}


def _kept(cfg: VisionConfig, part: str, images: int) -> set[int]:
    """Return the images of a call that go through each layer, fewer with drop path by subset."""
    if part not in ("encoder", "local views") or cfg.drop_path_mode == "mask":
        return {images}
    depth = cfg.depth if isinstance(cfg, ViTConfig) else sum(cfg.depths)
    rates = {cfg.drop_path(layer) for layer in range(depth)}
    return {num_kept(images, rate) if rate else images for rate in rates}


def _shown(cfg: TrainConfig, counts: StepCounts) -> Iterator[float]:
    """Yield the moments of the run, 0 to 1, at which an image shows different numbers of cells."""
    last, seen = max(cfg.num_steps - 1, 1), set()
    points = min(last, 10_000)
    for i in range(points + 1):
        num_own = replace(counts, progress=i / points).num_own
        if num_own not in seen:
            seen.add(num_own)
            yield i / points


def _max_calls(cfg: TrainConfig, passes: Mapping[str, ModuleCall]) -> int:
    """Return the calls of the module that is called most; terms of one target share a decoder."""
    modules = {"local views": "encoder"}
    for term in cfg.objective.active_terms:
        for part in (f"decoder of {term.name}", f"decoder of {term.name}, local views"):
            modules[part] = f"decoder of {term.target} {term.encoder}"
    calls: dict[str, int] = {}
    for part, each in passes.items():
        # "cells ...": rows of the last block of a decoder's call, or of what a captioner reads
        if not part.startswith("cells "):
            chunks = -(-each.images // cfg.parallel.chunk) if cfg.parallel.chunk else 1
            module = modules.get(part, part)
            calls[module] = calls.get(module, 0) + chunks
    return max(calls.values(), default=1)
