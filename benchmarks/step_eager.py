"""A training step's loss and moving average as one writes M3I first: what `step` times beside ours.

The networks and the drawn masks are given; here stand what goes through them, and the likelihoods
in plain torch.

Legend: P inputs of two images, N cells of the grid, n = N / 2 that an image shows, Q that are asked
of it, C width of the encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.benchmarks.gaussian import in_float32
from m3i_fast.models.positions import relative_positions
from m3i_fast.models.vit import ViT
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.mutual_information import MutualInformation
from m3i_fast.objectives.terms import Caption, Category
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.pipelines.batch import Batch


def eager_loss(
    model: MutualInformation, batch: Batch, mix: Mix, *, asked_only: bool = False
) -> Tensor:  # []
    """The sum over M3I's four terms with every input asked."""
    first, second = mix.members.T  # [P] each
    shown_first, shown_second = mix.token_index.chunk(2)  # [P, n] each
    own_view, other_view = (normalise(view) for view in batch.global_views)
    tokens_first = encode_shown(model, own_view[first], shown_first)
    tokens_second = encode_shown(model, own_view[second], shown_second)
    with torch.no_grad():
        if asked_only:
            z_own = model.target_encoder(own_view[first])
            z_other = model.target_encoder(other_view[second])
        else:
            z_own = model.target_encoder(own_view)[first]
            z_other = model.target_encoder(other_view)[second]
    boxes = batch.boxes[first, 0], batch.boxes[first, 0]
    intra = dense(model, tokens_first, shown_first, z_own, mix.queries("first", own=True), boxes)
    boxes = batch.boxes[second, 0], batch.boxes[second, 1]
    inter = dense(
        model, tokens_second, shown_second, z_other, mix.queries("last", own=False), boxes
    )
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


def encode_shown(
    model: MutualInformation, images: Tensor, shown: Tensor
) -> Tensor:  # [P, 3, H, W] fp32, [P, n] -> [P, n, C]
    encoder = model.encoder
    assert isinstance(encoder, ViT)  # train_config
    return encoder.encode(take(encoder.embed(images), shown))[:, encoder.num_prefix :]


def take(tokens: Tensor, index: Tensor) -> Tensor:  # [P, N, C], [P, Q] -> [P, Q, C]
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def dense(
    model: MutualInformation,
    tokens: Tensor,  # [P, n, C]
    shown: Tensor,  # [P, n] int64
    z: Tensor,  # [P, N, C], of the EMA encoder
    cells: Tensor,  # [P, Q] int64
    boxes: tuple[Tensor, Tensor],  # [P, 5] each, of the input's view and of the target's
) -> Tensor:  # []
    grid = model.grid
    position = relative_positions(*boxes, cells, input_grid=grid, target_grid=grid)
    z_hat = model.decoders["features_momentum"](tokens, shown, position)
    return in_float32(z_hat, take(z, cells), model.cfg.decorrelation_weight)


def category(
    model: MutualInformation, images: tuple[Tensor, ...], batch: Batch, mix: Mix
) -> Tensor:  # []
    (term,) = model.terms_of(Category)
    z_hat = torch.cat([F.normalize(term.head(tokens), dim=-1) for tokens in images])
    z = F.normalize(term.embedding, dim=-1)
    logits = term.log_scale.exp() * z_hat @ z.T
    return F.cross_entropy(logits, batch.label[mix.sample], ignore_index=-1)


def caption(
    model: MutualInformation, images: tuple[Tensor, ...], batch: Batch, mix: Mix
) -> Tensor:  # []
    """CLIP's loss among captioned images; those of one group are positives of each other."""
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
    return (of_images + of_captions) / 2


@torch.no_grad()
def eager_ema(average: nn.Module, online: nn.Module, momentum: float) -> None:
    for target, source in zip(average.parameters(), online.parameters(), strict=True):
        target.mul_(momentum).add_(source, alpha=1 - momentum)
