"""Terms whose targets are annotations of the picture: its category or its caption."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config.objective.objective import MAX_SCALE, ObjectiveConfig, Term
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.objectives.heads import GlobalHead
from m3i_fast.objectives.mixing import drop_tokens
from m3i_fast.objectives.row_statistics import (
    full_precision,
    ratio_over_ranks,
    sum_over_ranks,
    unit_rows,
    wide,
)
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, TermModule, weighted
from m3i_fast.objectives.terms.reversal import Reversal
from m3i_fast.ops import IGNORED

if TYPE_CHECKING:
    from m3i_fast.pipelines.batch import Batch

LOGITS_AT_ONCE = 2**24
"""Most logits that a monitor holds: 64 MiB."""
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0  # SigLIP's start, arXiv 2303.15343


class Annotation(TermModule):
    """A term whose target is an annotation of the picture, which not every picture has."""

    reversal: Reversal | None
    """What reverses the encoder's gradient, where the encoder is to forget the target."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, dim: int, sizes: Sizes) -> None:
        super().__init__(term, cfg, dim, sizes)
        reverses = term.reversal > 0
        self.reversal = Reversal(term.reversal, term.reversal_steps) if reverses else None

    def mean_rows(self, step: StepContext, monitor: Monitor | None) -> Tensor:  # [I + L B, P]
        """Return what the term's head reads of the encoder, and log the factor of a reversal."""
        rows = step.mean_rows()
        if self.reversal is None:
            return rows
        if monitor is not None:
            monitor(f"{self.term.name}_reversal", self.reversal.factor(rows))
        return self.reversal(rows)

    def text(self, batch: Batch) -> tuple[Tensor, Tensor]:  # [B, T] int, [B] int64
        """Return the token ids of the term's texts, zero padded, and how many each has."""
        if not self.term.column:
            return batch.token_ids, batch.num_tokens
        ids = batch.columns[self.term.column]
        return ids.clamp_min(0), (ids >= 0).sum(1)

    def num_rows(self, step: StepContext) -> int:
        """Return how many rows of this rank may have the term's target."""
        return step.num_rows

    def _known_empty(self, members: Tensor) -> bool:
        """Return whether it is known without a host synchronisation that no row has a target.

        With several ranks always False: a rank that skipped the term would miss its collectives.
        """
        known = members.device.type == "cpu" and self.process_group is None
        return known and not bool(members.any())

    def _share(self, members: Tensor) -> Tensor | float:  # [N] bool -> [] fp32
        """Return the factor of a mean over members: members / rows of all ranks, or 1.

        members: the rows that have a target.
        """
        if self.term.mean == "members":
            return 1.0
        counts = torch.stack([members.sum(), members.new_full((), len(members), dtype=torch.int64)])
        num_members, num_rows = sum_over_ranks(counts, self.process_group).float().unbind()
        return num_members / num_rows.clamp_min(1)


class Label(Annotation):
    """An annotation that is compared with the picture's embedding, by a learnt temperature tau."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        super().__init__(term, cfg, sizes.text.embed_dim, sizes)
        self.temperature = cfg.temperature
        self.head = GlobalHead(sizes.vision.summary_dim, cfg.head_hidden_dim, sizes.text.embed_dim)
        self.log_scale = nn.Parameter(torch.empty(()))

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        self.log_scale.fill_(-math.log(self.temperature))

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamp 1 / tau to [1, 100] in place, after the optimiser's step, as open_clip does."""
        self.log_scale.clamp_(0.0, math.log(MAX_SCALE))

    def project(self, summary: Tensor) -> Tensor:  # [I, s, P] -> [I, E] fp32
        """Project images by their summaries into the space of the targets, of any length."""
        return wide(self.head(summary))

    def embed(self, summary: Tensor) -> Tensor:  # [I, s, P] -> [I, E] fp32, unit length
        """Embed images by their summaries, in the space of the targets."""
        return unit_rows(self.project(summary))

    def _rows(self, step: StepContext, monitor: Monitor | None) -> Tensor:  # [I + L B, E]
        """Embed every image in an input, then every local view."""
        return unit_rows(wide(self.head.of_means(self.mean_rows(step, monitor))))

    def _nothing(self) -> tuple[Tensor, int]:
        """Return the loss 0 of a batch without targets, which can be differentiated."""
        return self.log_scale * 0, 0


class Category(Label):
    """A term whose z is the learnt embedding of the picture's category."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        count = sizes.column_of(term).num_names if term.column else sizes.num_classes
        if count < 1:
            raise ValueError(
                f"objective.terms: expected data with classes for {term.name!r}, got "
                f"{count} classes; leave the term out, or pack pictures with labels"
            )
        super().__init__(term, cfg, sizes)
        self.embedding = nn.Parameter(torch.empty(count, sizes.text.embed_dim))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        super().reset_own_parameters()
        nn.init.normal_(self.embedding, std=self.embedding.shape[-1] ** -0.5)

    def class_embeddings(self) -> Tensor:  # [K, E], unit length
        """Return the embeddings of all categories."""
        return unit_rows(self.embedding)

    def logits(self, summary: Tensor) -> Tensor:  # [I, s, P] -> [I, K] fp32
        """Return the logits of the categories of images, whose softmax the loss is taken of."""
        rows = self.embed(summary)
        return _products(rows, self.class_embeddings().to(rows.dtype), self.log_scale.exp())

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        batch, name = step.batch, self.term.column
        targets = step.per_row(batch.columns[name] if name else batch.label)
        members = targets != IGNORED
        if self._known_empty(members):
            return self._nothing()
        z = self.class_embeddings()
        z_hat, scale = self._rows(step, monitor), self.log_scale.exp()
        values = [
            weighted(
                weight * self._share(members[rows]),
                self.loss(z_hat[rows], z, scale, targets=targets[rows]),
            )
            for weight, rows in step.weighted_rows()
        ]
        if monitor is not None and self.reversal is not None:
            hit = accuracy(z_hat.detach(), z.detach(), targets, self.process_group)
            monitor(f"{self.term.name}_accuracy", hit)
        return sum(values[1:], start=values[0]), members.sum()


@torch.no_grad()
def accuracy(
    rows: Tensor,  # [N, D]
    classes: Tensor,  # [K, D]
    targets: Tensor,  # [N] int64
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # []
    """Return the share of the rows of all ranks whose target's logit is the largest.

    Targets of -1 are ignored, and it is 0 where all are. The logits of some rows at a time are in
    memory.
    """
    at_once = max(LOGITS_AT_ONCE // len(classes), 1)
    best = torch.cat([(part @ classes.T).argmax(1) for part in rows.split(at_once)])
    hits, some = (best == targets).sum().float(), (targets != IGNORED).sum()
    return ratio_over_ranks(hits, some, process_group).nan_to_num(0.0)


@full_precision
def _products(rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:  # [N, E], [K, E] -> [N, K]
    """Return the scaled cosines of rows of unit length, which autocast would round."""
    return scale * (rows @ columns.T)


class Caption(Label):
    """A term whose z is the text encoder's embedding of the picture's caption."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        if term.column:
            sizes.column_of(term)  # raises where there is none
        super().__init__(term, cfg, sizes)
        self.text_encoder = TextEncoder(sizes.text, layers=sizes.layers)
        self.token_dropout = cfg.mixing.token_dropout
        self.bias = nn.Parameter(torch.empty(())) if term.likelihood == "sigmoid" else None
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        super().reset_own_parameters()
        if self.bias is not None:
            self.log_scale.fill_(math.log(SIGMOID_SCALE))
            self.bias.fill_(SIGMOID_BIAS)

    def project_captions(self, token_ids: Tensor, num_tokens: Tensor) -> Tensor:
        """Project captions into the images' space: [B, T] int, [B] int64 -> [B, E] fp32."""
        return wide(self.text_encoder(token_ids, num_tokens))

    def embed_captions(self, token_ids: Tensor, num_tokens: Tensor) -> Tensor:
        """Embed captions: [B, T] int, [B] int64 -> [B, E] fp32, unit length."""
        return unit_rows(self.project_captions(token_ids, num_tokens))

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        batch, mix = step.batch, step.mix
        tokens = self.text(batch)
        if self._known_empty(tokens[1] > 0):
            return self._nothing()
        with step.stage("fwd.text"):
            z = self.embed_captions(*drop_tokens(*tokens, mix.token_priority, self.token_dropout))
        ids = batch.group_id.masked_fill(tokens[1] == 0, IGNORED)
        row_ids = step.per_row(ids)
        z_hat, scale = self._rows(step, monitor), self.log_scale.exp()
        members, values = row_ids != IGNORED, []
        for weight, rows in step.weighted_rows():
            ids_of = {"row_ids": row_ids[rows], "col_ids": ids}
            options = {**ids_of, **self.counts(step)}
            value = self.loss(z_hat[rows], z, scale, bias=self.bias, **options)
            values.append(weighted(weight * self._share(members[rows]), value))
        return sum(values[1:], start=values[0]), members.sum()
