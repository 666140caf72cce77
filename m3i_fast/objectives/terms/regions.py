"""The terms that write a region's box and its text, in either order (LocCa, arXiv 2403.19596).

Legend: I images, R most regions of an image, T tokens of a region with its box, V words of the text
vocabulary, K bins of a coordinate.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from m3i_fast.config.columns import REGION_TOKENS, REGION_UNIT, REGION_WIDTH
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.row_statistics import ratio_over_ranks
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes
from m3i_fast.objectives.terms.caption_tokens import TextTokens
from m3i_fast.objectives.terms.labels import accuracy
from m3i_fast.ops import IGNORED

BOX = REGION_WIDTH - REGION_TOKENS  # coordinates of a box


class RegionTokens(TextTokens):
    """A term whose z are the tokens of each region's box and text, after those before them.

    A coordinate is one token, K of which follow the V words of the text vocabulary: a box is four
    tokens for any tokenizer, where digits are as many as a tokenizer makes of them. Regions are
    those of the input's view. The loss is the mean over all tokens but the first of each region,
    the start of its text.
    """

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        sizes.column_of(term)  # raises where there is none
        num_words, num_bins = sizes.text.vocab_size, cfg.captioner.coordinate_bins
        super().__init__(
            term,
            cfg,
            sizes,
            replace(cfg.captioner, parallel=0.0),
            vocab_size=num_words + num_bins,
            context_length=REGION_WIDTH,
        )
        self.num_words, self.num_bins = num_words, num_bins

    @abstractmethod
    def order(self, ids: Tensor, box: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens in their order, and where in it the box begins.

        ids: [..., 32] of texts, of which the first is the start. box: [..., 4] tokens. count: [...,
        1] ids of each text. -> [..., 36], [..., 1].
        """

    def sequences(self, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, targets, and the place of the box.

        regions: [I, R, 36] int32, as `Batch.columns` has them. -> [I, R, 36] int64, [I, R, 35]
        int64, IGNORED after the last token and where there is no region, [I, R, 1].
        """
        box, ids = regions.long().split([BOX, REGION_TOKENS], dim=-1)
        bins = (box * self.num_bins // REGION_UNIT).clamp(0, self.num_bins - 1)
        count = (ids >= 0).sum(-1, keepdim=True)
        tokens, start = self.order(ids, self.num_words + bins, count)
        place = torch.arange(1, REGION_WIDTH, device=tokens.device)
        absent = (place >= count + BOX) | (count == 0)
        return tokens.clamp_min(0), tokens[..., 1:].masked_fill(absent, IGNORED), start

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        regions = step.batch.columns[self.term.column][step.mix.sample, 0]  # of the input's view
        members = (regions[..., BOX] >= 0).any(1)
        if self._known_empty(members):
            return (self.decoder.pos_embed * 0).sum() + self.vocabulary.sum() * 0, 0
        tokens, targets, start = self.sequences(regions)
        cells = step.encoded.views[0]
        assert isinstance(cells, Tensor)  # any_shape_conflicts
        hidden = self.hidden(cells, tokens)
        value = self.compare(step, hidden, targets, members)
        if monitor is not None:
            rows = hidden.detach()
            wanted, group = targets.flatten(), self.process_group
            hit = accuracy(rows.flatten(0, 2), self.vocabulary, wanted, group)
            monitor(f"{self.term.name}_accuracy", hit)
            monitor(f"{self.term.name}_iou", self.mean_iou(rows, regions, start))
        return value, members.sum()

    @torch.no_grad()
    def mean_iou(self, hidden: Tensor, regions: Tensor, start: Tensor) -> Tensor:
        """Return the mean IoU of boxes with the likeliest ones, of each coordinate after true ones.

        Of the boxes of all ranks.
        hidden: [I, R, 35, D]; regions: [I, R, 36] int32; start: [I, R, 1] -> [].
        """
        place = start - 1 + torch.arange(BOX, device=start.device)  # row t is of token t + 1
        rows = hidden.take_along_dim(place[..., None], dim=2)
        likeliest = (rows @ self.vocabulary[self.num_words :].T.to(rows.dtype)).argmax(-1)
        found = (likeliest.double() + 0.5) / self.num_bins
        true = regions[..., :BOX].double() / REGION_UNIT
        there = regions[..., BOX] >= 0
        overlap = (box_iou(found, true) * there).sum()
        return ratio_over_ranks(overlap, there.sum(), self.process_group).nan_to_num(0.0)


class GroundedCaption(RegionTokens):
    """LocCa's grounded captioning: a box, then the text of what is in it."""

    def order(self, ids: Tensor, box: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([ids[..., :1], box, ids[..., 1:]], -1)
        return tokens, torch.ones_like(count)


class ReferringBox(RegionTokens):
    """LocCa's automatic referring expressions: a text, then the box that it tells of."""

    def order(self, ids: Tensor, box: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        after = torch.arange(REGION_WIDTH, device=ids.device) - count  # [..., 36]
        words = torch.cat([ids, torch.full_like(box, -1)], -1)
        of_box = box.take_along_dim(after.clamp(0, BOX - 1), dim=-1)
        # of no region, whose count is 0, the box stands where no row predicts it
        return torch.where((after >= 0) & (after < BOX), of_box, words), count.clamp_min(1)


def box_iou(first: Tensor, second: Tensor) -> Tensor:  # [..., 4], [..., 4] -> [...]
    """Return the intersection over union of boxes: top, left, bottom and right."""

    def area(box: Tensor) -> Tensor:
        height, width = (box[..., 2:] - box[..., :2]).clamp_min(0).unbind(-1)
        return height * width  # torch compiles `prod` at its first call on a GPU

    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = area(torch.cat([low, high], -1))
    return shared / (area(first) + area(second) - shared).clamp_min(1e-12)
