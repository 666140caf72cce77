"""`StepContext`: the batch, encoded inputs and targets of one step, as the terms read them.

Legend: B samples, I images in inputs (K times P inputs), A inputs from which dense terms predict, n
cells an image shows, m cells of a local view, N cells of the grid, C width of a token, s tokens of
a summary, P their width, L local views.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.models.transformer.ragged import Cells, Ragged, tensor_of

if TYPE_CHECKING:
    from m3i_fast.config.objective.objective import Term
    from m3i_fast.objectives.mixing import Mix
    from m3i_fast.pipelines.batch import Batch

Rows = Literal["first", "last", "all", "every"]
Source = tuple[str, int]
"""A target's encoder, `Term.target_encoder`, and the index of the global view that it encodes."""
Stage = Callable[[str], AbstractContextManager[None]]
"""Opens a named stage of the step, which `observe.metrics.StageTimer` times."""


def no_stage(name: str) -> AbstractContextManager[None]:
    """Open a stage that is not timed."""
    return nullcontext()


def target_rows(terms: Iterable[Term]) -> dict[Source, Rows]:
    """Return which images of a view each target encoder has to encode, no more than terms need.

    `every` image in an input for terms of whole images; for dense terms the images from which they
    predict (`Mix.asked`), and `all` of these where terms differ.
    """
    needed: dict[Source, set[Rows]] = {}
    for term in terms:
        if term.encoder in ("none", "shared"):
            continue
        views = {0, 1} if term.symmetric else {int(term.view == "other")}
        for view in views:
            rows: Rows = term.asked if term.is_dense else "every"
            needed.setdefault((term.target_encoder, view), set()).add(rows)
    return {source: _union(rows) for source, rows in needed.items()}


def _union(rows: set[Rows]) -> Rows:
    if "every" in rows:
        return "every"
    return next(iter(rows)) if len(rows) == 1 else "all"


@dataclass(frozen=True, slots=True)
class Targets:
    """Tokens of the target views, without gradient and not normalised."""

    tokens: Mapping[Source, Cells]  # [R, N, C], of the images that `rows` names
    rows: Mapping[Source, Rows]


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoder's tokens of the inputs: every image's own cells, or all with mask tokens."""

    views: tuple[Cells, ...]  # [I, n, C] of the first view, and of the other one where asked for
    local: tuple[Cells, ...] = ()  # [B, m, C] of each whole local view

    @property
    def every(self) -> list[Cells]:
        """All views' tokens."""
        return [*self.views, *self.local]

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors of all views' tokens, the representation that the terms share."""
        return list(map(tensor_of, self.every))


@dataclass(frozen=True, slots=True)
class BatchWeight:
    """What a batch counts for in a step whose batches have unequal numbers of pictures.

    A step averages over its batches and its ranks. With these weights the average of means is the
    mean over all pictures of the step.
    """

    own_rows: float = 1.0
    """Weight of a mean over this rank's rows."""
    all_rows: float = 1.0
    """Weight of a mean over the rows of all ranks."""
    counts: tuple[int, ...] = ()
    """Pictures of each rank's batch; empty where all have as many."""

    @classmethod
    def of(cls, counts: Sequence[int], number: int, num_ranks: int) -> BatchWeight:
        """Return the weight of the step's batch of this number.

        counts: pictures of each batch; number m is the rank's m mod num_ranks.
        """
        if len(set(counts)) <= 1:
            return cls()
        mean = sum(counts) / len(counts)
        first = number - number % num_ranks
        of_ranks = tuple(counts[first : first + num_ranks])
        return cls(
            own_rows=counts[number] / mean,
            all_rows=sum(of_ranks) / num_ranks / mean,
            counts=of_ranks,
        )


WHOLE = BatchWeight()
"""The weight of batches of as many pictures each."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a term reads of one step: batch, mix, encoded inputs, targets and encoders."""

    batch: Batch
    mix: Mix
    encoded: Encoded
    targets: Targets
    encoders: Mapping[str, ImageEncoder]  # online, and by `Term.target_encoder`
    stage: Stage = no_stage
    weight: BatchWeight = WHOLE
    _means: dict[int, Tensor] = field(default_factory=dict)

    def with_encoded(self, encoded: Encoded) -> StepContext:
        """Return the same step with other tokens, which are summarised anew."""
        return replace(self, encoded=encoded, _means={})

    def embedding(self, view: int) -> Tensor:  # [I or B, P]
        """Average the summary of an encoded view, once a step.

        view: index into `Encoded.every`: the first view, the other one if it was encoded, then the
        local ones.
        """
        if view not in self._means:
            self._means[view] = _mean_summary(self.encoders["online"], self.encoded.every[view])
        return self._means[view]

    def mean_rows(self) -> Tensor:  # [I + L B, P]
        """Return the embeddings of the first view's images and of the local views, once a step.

        They are the rows of the label terms.
        """
        if -1 not in self._means:
            rows = [self.embedding(view) for view in (0, *self.local_indices)]
            self._means[-1] = torch.cat(rows)
        return self._means[-1]

    @property
    def local_indices(self) -> range:
        """Indices of the local views into `Encoded.every`."""
        return range(len(self.encoded.views), len(self.encoded.every))

    @property
    def num_rows(self) -> int:
        """Number of `mean_rows`, I + L B."""
        return len(self.mix.sample) + sum(len(local) for local in self.encoded.local)

    def weighted_rows(self) -> list[tuple[Tensor | float, slice]]:
        """Return (weight, slice) pairs that cover `mean_rows`.

        All rows with weight 1; for blended images all first ones with their share, and all second
        ones with theirs.
        """
        if self.mix.share is None:
            return [(1.0, slice(None))]
        share, num_inputs = self.mix.share[0], self.mix.num_inputs
        return [(share, slice(num_inputs)), (1 - share, slice(num_inputs, None))]

    def per_row(self, values: Tensor) -> Tensor:  # [B] -> [I + L B]
        """Repeat a value of each sample for every one of `mean_rows`."""
        return torch.cat([values[self.mix.sample], *(values for _ in self.local_indices)])

    @property
    def slice_key(self) -> Tensor:  # [] int64
        """Return what the step's random directions follow from."""
        assert self.mix.slice_key is not None  # draw_step_mix
        return self.mix.slice_key

    @torch.no_grad()
    def target_embedding(self, encoder: str, view: int) -> Tensor:  # [I, P]
        """Embed a global view of every image in an input by a target encoder."""
        tokens = self.target_tokens(encoder, view, "every")
        return _mean_summary(self.encoders[encoder], tokens)

    def target_tokens(self, encoder: str, view: int, rows: Rows) -> Cells:  # [R, N, C]
        """Return a target encoder's tokens of a global view, of the images that `rows` names."""
        source = encoder, view
        tokens, encoded_rows = self.targets.tokens[source], self.targets.rows[source]
        if rows == encoded_rows:
            return tokens
        if encoded_rows == "every":
            assert rows != "every"
            return self.mix.take_cells(tokens, rows)
        assert encoded_rows == "all" and rows != "every"
        first = 0 if rows == "first" else len(tokens) - self.mix.num_asked
        if isinstance(tokens, Ragged):
            return tokens.pictures(first, self.mix.num_asked)
        return tokens[first : first + self.mix.num_asked]


def _mean_summary(encoder: ImageEncoder, tokens: Cells) -> Tensor:  # [R, n, C] -> [R, P]
    if isinstance(tokens, Ragged):  # of a ViT, whose summary are its tokens
        return tokens.mean()
    return encoder.summarise(tokens).mean(1)


Monitor = Callable[[str, Tensor], None]
"""Logs a metric by name and value, which is detached."""
