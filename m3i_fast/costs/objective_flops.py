"""Floating-point operations of the terms, in closed form from the configs.

The operations of a loss itself stand in its row of `m3i_fast.config.objective.losses`.

Legend: B samples, I images in inputs, A of them (or all) asked by a dense term, n cells an image
shows, N cells of the grid, Q cells asked, m cells of a local view.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.flops import NONE, Flops, linear
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.config.objective.losses import LOSSES, LossSizes
from m3i_fast.config.objective.objective import Term
from m3i_fast.costs.encoder_flops import (
    block,
    internimage,
    internimage_pool,
    internimage_sampling,
    text,
    text_decoder,
    vit,
    vit_embed,
    vit_encode,
)
from m3i_fast.costs.step_sizes import SCALE, StepCounts
from m3i_fast.objectives.step_context import target_rows

TARGET, ENCODER, TEXT = "target encoder", "encoder", "text encoder"
DECODER, HEADS, LIKELIHOODS = "decoder", "heads", "likelihoods"
SAMPLING = "sampling"  # of DCNv3, in both encoders
PARTS = (ENCODER, TARGET, SAMPLING, TEXT, DECODER, HEADS, LIKELIHOODS)

Parts = dict[str, Flops]


def step(counts: StepCounts) -> Parts:
    """Count one training step of one rank by part, without optimiser and moving average."""
    parts: defaultdict[str, Flops] = defaultdict(Flops)
    _encode_targets(counts, parts)
    _encode_inputs(counts, parts)
    for term in counts.objective.active_terms:
        if counts.pictures is not None and term.kind.of == "cells":
            _add_cells(term, counts, parts)
        else:
            term.kind.counter()(term, counts, parts)
    for number in sorted(_summaries(counts)):
        rows, cells = counts.num_images, counts.num_tokens
        if number >= counts.num_views:
            rows, cells = counts.batch_size, counts.num_local_cells
        pooled = _summarise(counts.vision, rows, cells)
        parts[HEADS] += pooled if counts.encoder_grad else pooled.forward_only
    return {part: parts[part] for part in PARTS if parts[part] != NONE}


def decoder(
    cfg: DecoderConfig,
    *,
    num_images: int,
    num_own: int,
    num_asked: int,
    dims: tuple[int, int],
    input_grad: bool = True,
) -> Flops:
    """Count the dense decoder; dims: of the encoder's tokens and of what is predicted."""
    asked, tokens = num_images * num_asked, num_own + num_asked

    def layer(num_last: int | None) -> Flops:
        return block(num_images, tokens, cfg.dim, mlp_ratio=cfg.mlp_ratio, num_last=num_last)

    return (
        linear(num_images * num_own, dims[0], cfg.dim, input_grad=input_grad)
        + linear(asked, 2 * cfg.dim, cfg.dim, input_grad=False)
        + layer(None) * (cfg.depth - 1)
        + layer(num_asked)
        + linear(asked, cfg.dim, dims[1])
    )


def _add_cells(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add a term of cells of any shape: of pictures by their cells, as if views were alike."""
    pictures = counts.pictures
    assert pictures is not None
    views = (0, 1) if term.symmetric else (int(term.view == "other"),)
    total: defaultdict[str, Flops] = defaultdict(Flops)
    for view in views:
        for alike in counts.of_alike(view):
            term.kind.counter()(term, alike, total)
    samples = SCALE * counts.objective.mixing.images_per_input * len(views)
    for part, flops in total.items():
        parts[part] += flops.scaled(1 / (samples * pictures.num_steps))


def mlp(rows: int, *dims: int, input_grad: bool = True) -> Flops:
    """Count linear layers one after the other; input_grad: of the first, the others always."""
    flops = NONE
    for dim_in, dim_out in zip(dims[:-1], dims[1:], strict=True):
        flops += linear(rows, dim_in, dim_out, input_grad=input_grad)
        input_grad = True
    return flops


# ---- Encoders ------------------------------------------------------------------------------------


def _encode_targets(counts: StepCounts, parts: Parts) -> None:
    for (encoder, view), rows in target_rows(counts.objective.active_terms).items():
        if counts.objective.teacher_cache is not None and encoder.startswith("frozen"):
            continue  # read from the disk
        vision = replace(counts.encoder_of(encoder), drop_path_rate=0.0)  # in evaluation mode
        if counts.pictures is not None:
            assert isinstance(vision, ViTConfig)  # any_shape_conflicts
            share = counts.num_asked(rows) / counts.num_asked("every")
            whole = counts.pictures.encode(vision, [view]).forward_only
            parts[TARGET] += whole if share == 1 else whole.scaled(share)
            continue
        count = counts.num_asked(rows)
        parts[TARGET] += _whole(vision, count).forward_only
        if isinstance(vision, InternImageConfig):
            sampling = internimage_sampling(vision, count)
            parts[SAMPLING] += sampling.forward_only


def _encode_inputs(counts: StepCounts, parts: Parts) -> None:
    """Add the pass over the mixed inputs, in which an image may show but some of its cells."""
    vision, num_inputs = counts.vision, counts.num_inputs * counts.num_views
    num_images = counts.num_images * counts.num_views
    if counts.pictures is not None:
        assert isinstance(vision, ViTConfig)  # any_shape_conflicts
        parts[ENCODER] += counts.pictures.encode(vision, counts.encoded_views, counts.shown)
    elif counts.objective.mixing.encodes_alone:
        assert isinstance(vision, ViTConfig)  # vision_conflicts
        parts[ENCODER] += vit_embed(vision, num_inputs)
        own = vit_encode(vision, num_images, counts.num_own)
        parts[ENCODER] += _chunked(counts, num_images, own)
    else:
        _encode_whole(counts, parts, num_inputs)
    if counts.num_local and counts.pictures is None:
        _encode_whole(counts, parts, counts.num_local * counts.batch_size, counts.local_size)
    if not counts.encoder_grad:  # nothing is computed again, either
        for part in (ENCODER, SAMPLING):
            parts[part] = parts[part].forward_only


def _encode_whole(
    counts: StepCounts, parts: Parts, num_images: int, size: int | None = None
) -> None:
    vision = counts.vision
    if isinstance(vision, ViTConfig):
        tokens = ((size or vision.image_size) // vision.patch_size) ** 2
        parts[ENCODER] += vit_embed(vision, num_images, size)
        encoded = vit_encode(vision, num_images, tokens)
        parts[ENCODER] += _chunked(counts, num_images, encoded)
        return
    encoded = internimage(vision, num_images, size)
    parts[ENCODER] += _chunked(counts, num_images, encoded)
    sampling = internimage_sampling(vision, num_images, size)
    parts[SAMPLING] += _chunked(counts, num_images, sampling)


def _chunked(counts: StepCounts, rows: int, flops: Flops) -> Flops:
    """Return the operations of a call of so many rows, with its recomputation if it is chunked."""
    return flops.recomputed() if 0 < counts.chunk < rows else flops


def _whole(vision: VisionConfig, num_images: int, size: int | None = None) -> Flops:
    if isinstance(vision, ViTConfig):
        return vit(vision, num_images, size)
    return internimage(vision, num_images, size)


def _summarise(vision: VisionConfig, num_images: int, num_tokens: int) -> Flops:
    """Count the summary of tokens; a ViT's is the tokens themselves."""
    if isinstance(vision, ViTConfig):
        return NONE
    return internimage_pool(vision, num_images, num_tokens)


def _summaries(counts: StepCounts) -> set[int]:
    """Return the views whose summaries any term reads: the encoder's, then local ones."""
    local = range(counts.num_views, counts.num_views + counts.num_local)
    views: set[int] = set()
    for term in counts.objective.active_terms:
        if term.kind.summaries != "none":
            views |= set(range(1 + term.sees_both_views))
        if term.kind.summaries == "all":
            views |= set(local)
    return views


# ---- Terms ---------------------------------------------------------------------------------------


def add_label(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add a category or caption."""
    rows, dim = counts.num_summaries, counts.text.embed_dim
    hidden = counts.objective.head_hidden_dim
    widths = (hidden, dim) if hidden else (dim,)
    summary_dim = counts.vision.summary_dim
    parts[HEADS] += mlp(rows, summary_dim, *widths, input_grad=counts.encoder_grad)
    targets = counts.num_names(term)
    if term.target == "caption":
        captions = text(counts.text, counts.batch_size)
        parts[TEXT] += _chunked(counts, counts.batch_size, captions)
        targets = counts.batch_size * counts.num_ranks
    parts[LIKELIHOODS] += _loss(term, counts, rows=rows, dim=dim, targets=targets)


def add_column(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add labels or numbers, whose loss has no product."""
    rows, names = counts.num_summaries, counts.num_names(term)
    hidden = counts.objective.head_hidden_dim
    widths = (hidden, names) if hidden else (names,)
    parts[HEADS] += mlp(rows, counts.vision.summary_dim, *widths, input_grad=counts.encoder_grad)


def add_caption_tokens(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add the tokens of captions, of the full context length, padding included."""
    images, tokens, cfg = counts.num_images, counts.num_caption_tokens, counts.objective.captioner
    decoded = text_decoder(
        cfg,
        num_images=images,
        num_tokens=tokens,
        num_cells=counts.num_tokens,
        input_dim=counts.vision.dim,
        input_grad=counts.encoder_grad,
    )
    parts[DECODER] += _chunked(counts, images, decoded)
    rows, vocabulary = images * tokens, counts.text.vocab_size
    parts[LIKELIHOODS] += _loss(term, counts, rows=rows, dim=cfg.dim, targets=vocabulary)


def add_region_tokens(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add the tokens of regions, of as many as a view may have, padding included."""
    images, cfg = counts.num_images, counts.objective.captioner
    regions, tokens = counts.num_regions, counts.num_region_tokens
    decoded = text_decoder(
        cfg,
        num_images=images,
        num_texts=regions,
        num_tokens=tokens,
        num_cells=counts.num_tokens,
        input_dim=counts.vision.dim,
        input_grad=counts.encoder_grad,
    )
    parts[DECODER] += _chunked(counts, images, decoded)
    rows, vocabulary = images * regions * tokens, counts.text.vocab_size + cfg.coordinate_bins
    parts[LIKELIHOODS] += _loss(term, counts, rows=rows, dim=cfg.dim, targets=vocabulary)


def add_dense(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add pixels or features of cells."""
    if term.predictor == "projector":
        _add_dense_contrast(term, counts, parts)
        return
    vision, cfg = counts.vision, counts.objective
    dim = counts.encoder_of(term.target_encoder).dim
    if term.target == "pixels":
        dim = 3 * (vision.image_size // vision.grid) ** 2
    count, asked = counts.num_asked(term.asked), counts.num_queries(term)
    local = _num_local_asked(term, counts)
    encoded = vision.dim
    projects = cfg.projects(term)
    if projects:
        encoded = dim = cfg.decoder.dim
        parts[HEADS] += mlp(count * asked, vision.dim, dim, dim).forward_only
    if term.predictor == "linear":
        parts[HEADS] += linear(count * asked, vision.dim, dim, input_grad=counts.encoder_grad)
    else:
        _add_decoder(term, counts, parts, dims=(encoded, dim), projects=projects)
    if term.standardise == "phi_s":
        collects = term.statistics is None and counts.collects
        parts[HEADS] += Flops(2 * count * asked * dim**2 * (1 + collects))
    parts[LIKELIHOODS] += _loss(term, counts, rows=count * asked, dim=dim, calls=1 + local)


def add_gram(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add the cosines of all pairs of an image's cells."""
    pairs = counts.num_asked(term.asked) * counts.num_tokens**2
    target = counts.encoder_of(term.target_encoder).dim
    parts[HEADS] += Flops(forward=2 * pairs * target)
    own = 2 * pairs * counts.vision.dim
    parts[HEADS] += Flops(forward=own, backward=2 * own * counts.encoder_grad)
    images, cells = counts.num_asked(term.asked), counts.num_tokens
    parts[LIKELIHOODS] += _loss(term, counts, rows=images * cells, dim=cells)


def _num_local_asked(term: Term, counts: StepCounts) -> int:
    """Return the local views from which a term's decoder predicts as well."""
    return counts.num_local if term.view == "other" and term.predictor == "decoder" else 0


def _add_decoder(
    term: Term, counts: StepCounts, parts: Parts, *, dims: tuple[int, int], projects: bool = False
) -> None:
    """Add a term's questions to its decoder, and its projector where the decoder has one."""
    count, local = counts.num_asked(term.asked), _num_local_asked(term, counts)
    calls = (count, counts.num_own), (local * count, counts.num_local_cells)
    for images, cells in calls if local else calls[:1]:
        decoded = decoder(
            counts.objective.decoder,
            num_images=images,
            num_own=cells,
            num_asked=counts.num_queries(term),
            dims=dims,
            input_grad=counts.encoder_grad or projects,
        )
        if projects:
            rows, grad = images * cells, counts.encoder_grad
            decoded += mlp(rows, counts.vision.dim, dims[1], dims[1], input_grad=grad)
        parts[DECODER] += _chunked(counts, images, decoded)


def _add_dense_contrast(term: Term, counts: StepCounts, parts: Parts) -> None:
    vision, cfg, count = counts.vision, counts.objective, counts.num_asked(term.asked)
    dims = vision.dim, cfg.projector.hidden_dim, cfg.projector.output_dim
    rows = count * counts.num_tokens
    parts[HEADS] += mlp(rows, *dims, input_grad=counts.encoder_grad)
    parts[HEADS] += mlp(count * counts.num_cells, *dims).forward_only
    parts[LIKELIHOODS] += _loss(term, counts, rows=rows, dim=cfg.projector.output_dim)


def add_embedding(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add an embedding of a view."""
    sized, rows = counts.objective.projector, counts.num_images
    target = counts.encoder_of(term.target_encoder)
    dim = target.summary_dim if term.encoder == "frozen" else sized.output_dim
    directions, shared = 1 + term.symmetric, term.encoder == "shared"
    hidden = [sized.hidden_dim] * (sized.num_layers - 1)
    dims = counts.vision.summary_dim, *hidden, dim
    projector = mlp(rows, *dims, input_grad=counts.encoder_grad)
    parts[HEADS] += projector * (2 if shared else directions)
    if term.encoder == "momentum":
        parts[HEADS] += (projector * directions).forward_only
    if term.encoder != "shared":
        pooled = _summarise(target, rows, counts.num_cells)
        parts[HEADS] += (pooled * directions).forward_only
    if term.predictor == "projector_predictor":
        parts[HEADS] += mlp(rows, dim, sized.predictor_hidden_dim, dim) * directions
    parts[LIKELIHOODS] += _loss(term, counts, rows=rows, dim=dim, calls=directions)


def add_prototypes(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add a view's assignment to prototypes."""
    cfg, rows = counts.objective, counts.num_images
    sized = cfg.projector
    hidden = [sized.hidden_dim] * (sized.num_layers - 1)
    dims = counts.vision.summary_dim, *hidden, sized.output_dim
    seen = rows * (2 if term.sees_both_views else 1) + counts.num_local * counts.batch_size
    parts[HEADS] += mlp(seen, *dims, input_grad=counts.encoder_grad)
    if term.encoder == "momentum":
        targets = mlp(rows, *dims) + _summarise(counts.vision, rows, counts.num_cells)
        parts[HEADS] += (targets * (1 + term.symmetric)).forward_only
    # Each target view is asked of the other global view and of every local one, in one call.
    asked = (rows + counts.num_local * counts.batch_size) * (1 + term.symmetric)
    parts[LIKELIHOODS] += _loss(
        term,
        counts,
        rows=asked,
        dim=sized.output_dim,
        targets=cfg.num_prototypes,
        assigned=rows * (1 + term.symmetric),
    )


def add_cell_prototypes(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add cells' assignments to prototypes: decoder, head and loss."""
    cfg, vision = counts.objective, counts.vision
    sized = cfg.projector
    hidden = [sized.hidden_dim] * (sized.num_layers - 1)
    dims = vision.dim, *hidden, sized.output_dim
    views, count, asked = 1 + term.symmetric, counts.num_asked(term.asked), counts.num_queries(term)
    local = _num_local_asked(term, counts)
    assigned, rows = views * count * asked, (views + local) * count * asked
    decodes = term.predictor == "decoder"
    if decodes:
        _add_decoder(term, counts, parts, dims=(vision.dim, vision.dim))
    parts[HEADS] += mlp(rows, *dims, input_grad=counts.encoder_grad or decodes)
    parts[HEADS] += mlp(assigned, *dims).forward_only
    parts[LIKELIHOODS] += _loss(
        term,
        counts,
        rows=rows,
        dim=sized.output_dim,
        targets=cfg.num_prototypes,
        assigned=assigned,
    )


def add_summary(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add a spread of the encoder's summaries, by view."""
    rows, dim = counts.num_images, counts.vision.summary_dim
    parts[LIKELIHOODS] += _loss(term, counts, rows=rows, dim=dim, calls=counts.num_views)


def add_mean_embedding(term: Term, counts: StepCounts, parts: Parts) -> None:
    """Add the embeddings of all views of a picture."""
    sized = counts.objective.projector
    hidden = [sized.hidden_dim] * (sized.num_layers - 1)
    rows = counts.num_images * counts.num_views + counts.num_local * counts.batch_size
    dims = counts.vision.summary_dim, *hidden, sized.output_dim
    parts[HEADS] += mlp(rows, *dims, input_grad=counts.encoder_grad)
    parts[LIKELIHOODS] += _loss(term, counts, rows=rows, dim=sized.output_dim)


def _loss(
    term: Term,
    counts: StepCounts,
    *,
    rows: int,
    dim: int,
    targets: int | None = None,
    assigned: int = 0,
    calls: int = 1,
) -> Flops:
    """Count the calls of a term's loss in a step, as its row of `LOSSES` says.

    rows, dim, targets, assigned: those of a call; targets are the rows of all ranks unless given.
    """
    loss, cfg, vision = LOSSES[term.loss_key], counts.objective, counts.vision
    learns_target = term.target == "embedding" and term.regulariser != "stop_gradient"
    sizes = LossSizes(
        rows=rows,
        dim=dim,
        targets=rows * counts.num_ranks if targets is None else targets,
        assigned=assigned,
        target_grad=term.is_annotation or (term.encoder == "shared" and learns_target),
        queue_length=cfg.queue_length if term.regulariser == "queue" else 0,
        cells=counts.num_cells if term.is_dense else 0,
        cell_dim=vision.dim if term.is_dense else 0,
        decorrelates=cfg.decorrelation_weight != 0,
        slices=cfg.num_slices,
    )
    return loss.flops(sizes) * calls + loss.flops_once(sizes)
