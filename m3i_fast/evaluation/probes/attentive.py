"""Attentive probe: a learned query attends to the frozen tokens, as in V-JEPA's evaluation.

It is V-JEPA's pooler (arXiv 2404.08471, appendix; one query, one block), then a linear classifier:

    z = q + proj(attention(q, norm_1(tokens)));  z = z + mlp(norm_2(z));  logits = linear(z)

with biases, heads of 64 features where the width allows, and an MLP of 4 times the width with GELU.
CAE's variant (arXiv 2202.03026) has neither the residual nor the MLP. Settings are those of the
published configs for ImageNet: AdamW, weight decay 0.001 of what has two dimensions or more, no
warm-up, half a cosine to 0, gradients clipped to a norm of 1, 20 epochs of batches of 1024. V-JEPA
has one learning rate, 0.001; here several are trained at once and chosen from.

One query asks for no keys and values of every token. Its scores are products of the normalised
tokens with one vector a head, W_k^T q, and values are projected after they are averaged, which is
the same function for H / C of the products; tokens are normalised once for all learning rates.

Legend: B pictures, R learning rates, N tokens, C width, H heads, D width of a head, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from m3i_fast.evaluation.batches import (
    Batches,
    Encode,
    LabelledBatch,
    expect_evaluable,
    expect_labels,
    labelled,
    repeated,
)
from m3i_fast.evaluation.probes.accuracy import top_k_hits
from m3i_fast.evaluation.probes.rate_sweep import expect_rates, set_gradients, slices_of

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
WEIGHT_DECAY = 1e-3
CLIP_GRAD_NORM = 1.0
INIT_STD = 0.02
MLP_RATIO = 4
HEAD_DIM = 64
NORM_EPS = 1e-5  # of nn.LayerNorm, as V-JEPA's pooler has it


class AttentiveProbes(nn.Module):
    """R attentive classifiers of one shape, whose parameters are stacked: [R, ...] each.

    Names and shapes behind R are those of torch's MultiheadAttention, LayerNorm and Linear. All R
    start alike. Raises ValueError where num_heads does not divide dim.
    """

    def __init__(
        self, num_probes: int, dim: int, num_classes: int, *, num_heads: int, seed: int
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {dim} (dim), got {num_heads}")
        self.num_heads, self.dim = num_heads, dim
        hidden = MLP_RATIO * dim
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, scale: float = 1.0) -> nn.Parameter:
            one = nn.init.trunc_normal_(torch.empty(shape), std=INIT_STD, generator=generator)
            return nn.Parameter((one * scale).repeat(num_probes, *(1,) * len(shape)))

        def constant(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full((num_probes, *shape), float(value)))

        depth_scale = 1 / math.sqrt(2)  # of what is added to the residual stream
        self.query = drawn(1, dim)
        self.norm1_weight, self.norm1_bias = constant(1, dim), constant(0, dim)
        self.in_proj_weight, self.in_proj_bias = drawn(3 * dim, dim), constant(0, 3 * dim)
        self.out_proj_weight = drawn(dim, dim, scale=depth_scale)
        self.out_proj_bias = constant(0, dim)
        self.norm2_weight, self.norm2_bias = constant(1, dim), constant(0, dim)
        self.fc1_weight, self.fc1_bias = drawn(hidden, dim), constant(0, hidden)
        self.fc2_weight, self.fc2_bias = drawn(dim, hidden, scale=depth_scale), constant(0, dim)
        self.head_weight, self.head_bias = drawn(num_classes, dim), constant(0, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, N, C] -> [R, B, K] fp32
        """Classify pictures by their tokens, prefix and patches alike."""
        pooled = self._attend(F.layer_norm(tokens.float(), (self.dim,), eps=NORM_EPS))
        z = self.query + _linear(pooled, self.out_proj_weight, self.out_proj_bias)
        normed = F.layer_norm(z, (self.dim,), eps=NORM_EPS)
        hidden = normed * self.norm2_weight[:, None] + self.norm2_bias[:, None]
        hidden = F.gelu(_linear(hidden, self.fc1_weight, self.fc1_bias))
        z = z + _linear(hidden, self.fc2_weight, self.fc2_bias)
        return _linear(z, self.head_weight, self.head_bias)

    def _attend(self, normed: Tensor) -> Tensor:  # [B, N, C] -> [R, B, C]
        """Average the values of all tokens by the query's attention, a head at a time."""
        heads = (self.num_heads, self.dim // self.num_heads)
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3, 1)  # [R, C, C] each
        bias_q, _, bias_v = self.in_proj_bias.chunk(3, 1)  # a key's bias cancels in the softmax
        query = _linear(self.query, weight_q, bias_q).unflatten(-1, heads)  # [R, 1, H, D]
        direction = query.transpose(1, 2) @ weight_k.unflatten(1, heads)  # [R, H, 1, C]
        direction = direction[:, :, 0] * self.norm1_weight[:, None] / math.sqrt(heads[1])
        scores = normed @ direction.flatten(0, 1).T  # [B, N, R H]
        mean = scores.softmax(1).mT @ normed  # [B, R H, C]
        mean = mean.unflatten(1, direction.shape[:2]).permute(1, 2, 0, 3)  # [R, H, B, C]
        mean = mean * self.norm1_weight[:, None, None] + self.norm1_bias[:, None, None]
        values = mean @ weight_v.unflatten(1, heads).mT  # [R, H, B, D]
        return values.transpose(1, 2).flatten(2) + bias_v[:, None]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply each probe's own linear layer: [R, B, C], [R, D, C], [R, D] -> [R, B, D]."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentiveResult:
    """The accuracy of the probe at every learning rate, and what the chosen one says."""

    learning_rates: tuple[float, ...]  # [R]
    choice_top1: NDArray[np.float64]  # [R], on the pictures that the choice was made on
    top1: NDArray[np.float64]  # [R], on the validation pictures
    top5: NDArray[np.float64]  # [R]
    chosen: int  # index into learning_rates
    logits: NDArray[np.float32]  # [M, K] of the chosen one, labelled validation pictures in order
    label: NDArray[np.int64]  # [M]
    loss: NDArray[np.float32]  # [R, steps], mean cross-entropy of each training batch

    @property
    def chosen_top1(self) -> float:
        """Return the chosen probe's accuracy on the validation pictures."""
        return float(self.top1[self.chosen])


def attentive_probe(
    encode: Encode,
    batches: Batches,
    choice: Batches,
    validation: Batches,
    *,
    num_classes: int,
    num_steps: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_heads: int | None = None,
    seed: int,
    device: torch.device,
) -> AttentiveResult:
    """Train a probe for each learning rate in one pass over the frozen tokens, and choose one.

    encode: frozen; called without gradients, prefix tokens are attended to like all others. choice:
    training pictures that `batches` does not have; the highest accuracy on them wins, of equal ones
    the first rate. Of `choice` and `validation` epoch 0 is read: its first batch is checked before
    the training, and pictures of label -1, which is none, are left out. num_heads: None for heads
    of 64 features, or one head where 64 does not divide the width. One process computes all; of
    several ranks let the first one call this.

    Raises ValueError where a label is outside 0..num_classes - 1 (unlabelled pictures are to be
    left out of the batches to train on), or there are no batches.
    """
    expect_rates(learning_rates)
    for name, each in (("choice", choice), ("validation", validation)):
        expect_evaluable(name, each, num_classes)
    probes, loss = _train(
        encode, batches, num_classes, num_steps, learning_rates, num_heads, seed, device
    )
    of_choice = _measured("choice", encode, probes, choice(0), num_classes, device)
    chosen = int(of_choice.top1.argmax())
    found = _measured("validation", encode, probes, validation(0), num_classes, device, chosen)
    return AttentiveResult(
        learning_rates=tuple(learning_rates),
        choice_top1=of_choice.top1,
        top1=found.top1,
        top5=found.top5,
        chosen=chosen,
        logits=found.logits,
        label=found.label,
        loss=loss.cpu().numpy(),
    )


def _train(
    encode: Encode,
    batches: Batches,
    num_classes: int,
    num_steps: int,
    rates: Sequence[float],
    num_heads: int | None,
    seed: int,
    device: torch.device,
) -> tuple[AttentiveProbes, Tensor]:  # [R, steps] losses
    losses = torch.zeros(len(rates), num_steps, device=device)
    training: _Training | None = None
    for step, (pictures, label) in enumerate(repeated(batches, num_steps)):
        tokens, target = _encoded(encode, pictures, label, num_classes, device)
        if training is None:
            dim = tokens.shape[-1]
            heads = num_heads or (1 if dim % HEAD_DIM else dim // HEAD_DIM)
            probes = AttentiveProbes(len(rates), dim, num_classes, num_heads=heads, seed=seed)
            training = _Training(probes.to(device), rates, num_steps)
        losses[:, step] = training.step(tokens, target)
    if training is None:
        raise ValueError(f"num_steps: expected one or more, got {num_steps}")
    return training.probes, losses


class _Training:
    """R probes and the optimiser that steps them."""

    def __init__(self, probes: AttentiveProbes, rates: Sequence[float], num_steps: int) -> None:
        self.probes, self.parameters = probes, [*probes.parameters()]
        self.slices = slices_of(self.parameters)
        groups = []
        for of_probe, rate in zip(self.slices, rates, strict=True):
            for decays in (True, False):
                chosen = [p for p in of_probe if (p.ndim > 1) == decays]
                decay = WEIGHT_DECAY if decays else 0.0
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)

    def step(self, tokens: Tensor, target: Tensor) -> Tensor:  # [B, N, C], [B] -> [R]
        """Step every probe once, and return the losses before the step."""
        logits = self.probes(tokens)
        targets = target.expand(len(logits), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = loss.view_as(targets).mean(1)
        gradients = torch.autograd.grad(loss.sum(), self.parameters)
        squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
        shrink = (CLIP_GRAD_NORM / (squares.sqrt() + 1e-6)).clamp(max=1.0)  # [R]
        clipped = [g * shrink.view(-1, *(1,) * (g.ndim - 1)) for g in gradients]
        set_gradients(self.slices, clipped)
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()


@torch.no_grad()
def _encoded(
    encode: Encode, pictures: Tensor, label: Tensor, num_classes: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # [B, N, C], [B]
    """Encode the pictures of a batch and check their labels."""
    expect_labels(label, num_classes)
    return encode(pictures.to(device)).detach(), label.to(device)


class _Measured(NamedTuple):
    """The accuracy of all probes, and the logits of one of them."""

    top1: NDArray[np.float64]  # [R]
    top5: NDArray[np.float64]  # [R]
    logits: NDArray[np.float32]  # [M, K]
    label: NDArray[np.int64]  # [M]


@torch.no_grad()
def _measured(
    name: str,
    encode: Encode,
    probes: AttentiveProbes,
    batches: Iterable[LabelledBatch],
    num_classes: int,
    device: torch.device,
    kept: int = 0,
) -> _Measured:
    """Sum the hits of all probes batch by batch; only the logits of probe `kept` stay in memory."""
    hits, logits, labels = [], [], []
    for batch in batches:
        pictures, label = labelled(batch, num_classes)
        if not len(label):
            continue
        tokens, target = _encoded(encode, pictures, label, num_classes, device)
        of_probes = probes(tokens)  # [R, B, K]
        hits.append(torch.stack([top_k_hits(of_probes, target, k=k).sum(-1) for k in (1, 5)]))
        logits.append(of_probes[kept].cpu())
        labels.append(label.cpu())
    if not labels:
        raise ValueError(f"{name}: expected labelled pictures, got none")
    label = torch.cat(labels)
    top1, top5 = torch.stack(hits).sum(0).cpu().numpy() / len(label)
    return _Measured(top1, top5, torch.cat(logits).numpy(), label.numpy())
