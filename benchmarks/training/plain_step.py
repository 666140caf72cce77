"""A training step's loss and moving average as one writes M3I first: what `step` times beside ours.

The networks and the drawn masks are given; here stand what goes through them, and the likelihoods
in plain torch.

Legend: B samples, P inputs of two images, N cells of the grid, n = N / 2 that an image shows, Q
that are asked of it, C width of the encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.models.transformer.positions import relative_positions
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms import Caption, Category, Dense
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.pipelines.batch import Batch


def eager_loss(
    model: MutualInformation, batch: Batch, mix: Mix, *, asked_only: bool = False
) -> Tensor:  # []
    """Return the sum over M3I's four terms, predicting every input."""
    first, second = mix.members.T  # [P] each
    shown_first, shown_second = mix.token_index.chunk(2)  # [P, n] each
    own_view, other_view = (normalise(view) for view in batch.global_views)
    tokens = model.encoder.encode_cells(mixed(own_view, mix))
    tokens_first, tokens_second = take(tokens, shown_first), take(tokens, shown_second)
    with torch.no_grad():
        if asked_only:
            z_own = model.target_encoder(own_view[first])
            z_other = model.target_encoder(other_view[second])
        else:
            z_own = model.target_encoder(own_view)[first]
            z_other = model.target_encoder(other_view)[second]
    boxes = batch.boxes[first, 0], batch.boxes[first, 0]
    asked = mix.queries("first", own=True), mix.queries("last", own=False)
    intra = dense(model, "intra", tokens_first, shown_first, z_own, asked[0], boxes)
    boxes = batch.boxes[second, 0], batch.boxes[second, 1]
    inter = dense(model, "inter", tokens_second, shown_second, z_other, asked[1], boxes)
    images = (tokens_first, tokens_second)
    values = {
        "intra": intra,
        "inter": inter,
        "category": category(model, images, batch, mix),
        "caption": caption(model, images, batch, mix),
    }
    return torch.stack([term.weight * values[term.name] for term in model.cfg.active_terms]).sum()


def normalise(views: Tensor) -> Tensor:  # [B, 3, H, W] uint8 -> fp32
    mean, std = (
        torch.tensor(values, device=views.device).view(3, 1, 1)
        for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (views.float() / 255 - mean) / std


def mixed(views: Tensor, mix: Mix) -> Tensor:  # [B, 3, H, W] fp32 -> [P, 3, H, W]
    """Return inputs whose cells have the pixels of the image that shows them."""
    cell = views.shape[-1] // mix.choice.shape[-1]
    is_second = mix.choice.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None] == 1
    first, second = mix.members.T
    return torch.where(is_second, views[second], views[first])


def take(tokens: Tensor, index: Tensor) -> Tensor:  # [P, N, C], [P, Q] -> [P, Q, C]
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def dense(
    model: MutualInformation,
    name: str,
    tokens: Tensor,  # [P, n, C]
    shown: Tensor,  # [P, n] int64
    z: Tensor,  # [P, N, C], of the EMA encoder
    cells: Tensor,  # [P, Q] int64
    boxes: tuple[Tensor, Tensor],  # [P, 5] each, of the input's view and of the target's
) -> Tensor:  # []
    grid = model.grid
    position = relative_positions(*boxes, cells, input_grid=grid, target_grid=grid)
    z_hat = model.decoders["features_momentum"](tokens, shown, position)
    (standardise,) = (t.standardise for t in model.terms_of(Dense) if t.term.name == name)
    assert standardise is not None
    z = standardise(take(z, cells))
    p, t = z_hat.flatten(0, 1), F.layer_norm(z, z.shape[-1:]).flatten(0, 1)
    covariance = torch.cov(t.T, correction=0)
    spread = ((p @ covariance) * p).sum(1).mean() / p.shape[1]
    return F.mse_loss(p, t) + model.cfg.decorrelation_weight * spread


def category(
    model: MutualInformation, images: tuple[Tensor, ...], batch: Batch, mix: Mix
) -> Tensor:  # []
    (term,) = model.terms_of(Category)
    z_hat = torch.cat([F.normalize(term.head(tokens), dim=-1) for tokens in images])
    z = F.normalize(term.embedding, dim=-1)
    logits = term.log_scale.exp() * z_hat @ z.T
    labels = batch.label[mix.sample]
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / len(labels)


def caption(
    model: MutualInformation, images: tuple[Tensor, ...], batch: Batch, mix: Mix
) -> Tensor:  # []
    """Return CLIP's loss among captioned images; a group's are positives of each other."""
    (term,) = model.terms_of(Caption)
    z_hat = torch.cat([F.normalize(term.head(tokens), dim=-1) for tokens in images])
    z = F.normalize(term.text_encoder(batch.token_ids, batch.num_tokens), dim=-1)
    captioned = batch.num_tokens > 0
    of_rows = captioned[mix.sample]
    logits = term.log_scale.exp() * z_hat[of_rows] @ z[captioned].T
    groups = batch.group_id[mix.sample][of_rows][:, None] == batch.group_id[captioned]
    positive = groups.float()
    of_images = F.cross_entropy(logits, positive / positive.sum(1, keepdim=True))
    of_captions = F.cross_entropy(logits.T, positive.T / positive.T.sum(1, keepdim=True))
    return (of_images + of_captions) / 2 * len(logits) / len(of_rows)


@torch.no_grad()
def eager_ema(average: nn.Module, online: nn.Module, momentum: float) -> None:
    for target, source in zip(average.parameters(), online.parameters(), strict=True):
        target.mul_(momentum).add_(source, alpha=1 - momentum)
