"""The term that writes the picture's caption, token after token, and what all such terms share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_fast.config.objective.heads import CaptionerConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.layers import INIT_STD
from m3i_fast.models.transformer.text_decoder import TextDecoder
from m3i_fast.objectives.step_context import Monitor, StepContext
from m3i_fast.objectives.terms.base import Sizes, weighted
from m3i_fast.objectives.terms.labels import Annotation, accuracy
from m3i_fast.ops import IGNORED


class TextTokens(Annotation):
    """A term whose z are tokens of texts, each predicted from those before it by a decoder.

    The decoder reads the image's own cells; local views, which show a part of what the text tells,
    are not read. The logits [tokens, vocabulary] are never in memory.
    """

    def __init__(
        self,
        term: Term,
        cfg: ObjectiveConfig,
        sizes: Sizes,
        sized: CaptionerConfig,
        *,
        vocab_size: int,
        context_length: int,
    ) -> None:
        """sized: the decoder; vocab_size, context_length: of its texts."""
        super().__init__(term, cfg, sized.dim, sizes)
        self.decoder = TextDecoder(
            sized,
            vocab_size=vocab_size,
            context_length=context_length,
            input_dim=sizes.vision.dim,
            layers=sizes.layers,
        )
        self.vocabulary = nn.Parameter(torch.empty(vocab_size, sized.dim))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        nn.init.normal_(self.vocabulary, std=INIT_STD)

    def hidden(self, cells: Tensor, token_ids: Tensor, parallel: Tensor | None = None) -> Tensor:
        """Return what is compared with the vocabulary: [I, n, C], [I, T] -> [I, T - 1, D].

        The logits of token t + 1 are row t's products with `vocabulary`. Several texts of an image,
        and parallel: as of the decoder.
        """
        hidden: Tensor = self.decoder(cells, token_ids, parallel)
        return hidden.to(self.vocabulary.dtype)

    def num_rows(self, step: StepContext) -> int:
        """Return the number of images: local views are not read."""
        return len(step.mix.sample)

    def compare(
        self,
        step: StepContext,
        hidden: Tensor,  # [I, ..., D]
        targets: Tensor,  # [I, ...] int64, IGNORED where there is none
        members: Tensor,  # [I] bool, the images that have a text
    ) -> Tensor:  # []
        """Return the mean over targets of all ranks, by what it is a mean over."""
        one = hidden.new_ones(())
        values = [
            weighted(
                weight * self._share(members[rows]),
                self.loss(
                    hidden[rows].flatten(0, -2),
                    self.vocabulary,
                    one,
                    targets=targets[rows].flatten(),
                ),
            )
            for weight, rows in step.weighted_rows()
        ]
        return sum(values[1:], start=values[0])


class CaptionTokens(TextTokens):
    """A term whose z are the tokens of the picture's caption, each predicted from those before it.

    The loss is the mean over all tokens but the first one of each caption, as open_clip's
    `CoCaLoss` has it.
    """

    def __init__(self, term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> None:
        sized = cfg.captioner
        if term.column:
            sizes.column_of(term)  # raises where there is none
        super().__init__(
            term,
            cfg,
            sizes,
            sized,
            vocab_size=sizes.text.vocab_size,
            context_length=sizes.text.context_length,
        )
        self.parallel = sized.parallel

    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        mix = step.mix
        ids, lengths = self.text(step.batch)
        num_tokens = lengths[mix.sample]
        members = num_tokens > 1
        if self._known_empty(members):
            return (self.decoder.pos_embed * 0).sum(), 0
        token_ids = ids[mix.sample]
        parallel = None
        if self.parallel:
            # The draw of a caption's first token, which is never dropped.
            parallel = mix.token_priority[mix.sample, 0] < self.parallel
        cells = step.encoded.views[0]
        assert isinstance(cells, Tensor)  # any_shape_conflicts
        hidden = self.hidden(cells, token_ids, parallel)
        place = torch.arange(1, token_ids.shape[1], device=token_ids.device)
        targets = token_ids[:, 1:].long().masked_fill(place >= num_tokens[:, None], IGNORED)
        value = self.compare(step, hidden, targets, members)
        if monitor is not None:
            rows, wanted = hidden.detach().flatten(0, 1), targets.flatten()
            hit = accuracy(rows, self.vocabulary, wanted, self.process_group)
            monitor(f"{self.term.name}_accuracy", hit)
        return value, members.sum()
