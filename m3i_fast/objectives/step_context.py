"""What the encoders said in a step, as the terms ask for it.

Legend: B samples, I images in inputs (K times P inputs), A inputs that dense terms are asked of, n
cells an image shows, m cells of a local view, N cells of the grid, C width of a token, s tokens of
a summary, P their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from m3i_fast.models.encoder import ImageEncoder

if TYPE_CHECKING:
    from m3i_fast.config.objective import Term
    from m3i_fast.objectives.mixing import Mix
    from m3i_fast.pipelines.batch import Batch

Rows = Literal["first", "last", "all", "every"]
Source = tuple[str, int]
"""Who encodes the target, momentum or frozen, and which global view."""
Stage = Callable[[str], AbstractContextManager[None]]
"""Names a part of a step to who times it (`observe.metrics.StageTimer`)."""


def no_stage(name: str) -> AbstractContextManager[None]:
    """Where nobody times the step."""
    return nullcontext()


def target_rows(terms: Iterable[Term]) -> dict[Source, Rows]:
    """Which images of a view a target encoder has to see: those asked of dense terms, or every one.

    No more than the terms need: `all` asked ones where terms ask different ones.
    """
    found: dict[Source, set[Rows]] = {}
    for term in terms:
        if term.encoder not in ("momentum", "frozen"):
            continue
        views = {int(term.view == "other")} | ({0} if term.symmetric else set())
        for view in views:
            rows: Rows = term.asked if term.is_dense else "every"
            found.setdefault((term.encoder, view), set()).add(rows)
    return {source: _union(rows) for source, rows in found.items()}


def _union(rows: set[Rows]) -> Rows:
    if "every" in rows:
        return "every"
    return next(iter(rows)) if len(rows) == 1 else "all"


@dataclass(frozen=True, slots=True)
class Targets:
    """Tokens of the target views, without gradient and not yet normalised; all views of an encoder
    come from one call."""

    tokens: Mapping[Source, Tensor]  # [R, N, C], rows as `rows` says
    rows: Mapping[Source, Rows]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of the input: every image's own cells."""

    views: tuple[Tensor, ...]  # [I, n, C] of the first view, and of the other one where asked for
    local: tuple[Tensor, ...] = ()  # [B, m, C] of each whole local view

    @property
    def every(self) -> list[Tensor]:
        """The representation that all terms share."""
        return [*self.views, *self.local]


@dataclass(frozen=True, slots=True)
class Seen:
    """A step, to a term."""

    batch: Batch
    mix: Mix
    encoded: Encoded
    targets: Targets
    encoders: Mapping[str, ImageEncoder]  # online, momentum, frozen: those that there are
    stage: Stage = no_stage
    _summaries: dict[int, Tensor] = field(default_factory=dict)

    def reading(self, encoded: Encoded) -> Seen:
        """The same step with the tokens of `encoded`, which are summarised anew."""
        return replace(self, encoded=encoded, _summaries={})

    def summary(self, number: int) -> Tensor:  # [I or B, s, P]
        """Of the views the encoder saw: the first, the other one if it did, then local ones."""
        if number not in self._summaries:
            tokens = self.encoded.every[number]
            self._summaries[number] = self.encoders["online"].summarise(tokens)
        return self._summaries[number]

    def embedded(self, number: int) -> Tensor:  # [I or B, P]
        return self.summary(number).mean(1)

    @property
    def summaries(self) -> list[Tensor]:
        """Of the first view's images, then of local views."""
        return [self.summary(0)] + [self.summary(n) for n in self.local_numbers]

    @property
    def local_numbers(self) -> range:
        """Of local views, as `summary` counts."""
        return range(len(self.encoded.views), len(self.encoded.every))

    @property
    def num_rows(self) -> int:
        """Of `summaries`."""
        return len(self.mix.sample) + sum(len(local) for local in self.encoded.local)

    def weighted_rows(self) -> list[tuple[Tensor | float, slice]]:
        """Parts of the rows of `summaries` with the weight of each: all of them at once, or, of
        blended images, all first ones with their share and all second ones with theirs."""
        if self.mix.share is None:
            return [(1.0, slice(None))]
        share, num_inputs = self.mix.share[0], self.mix.num_inputs
        return [(share, slice(num_inputs)), (1 - share, slice(num_inputs, None))]

    def of_rows(self, values: Tensor) -> Tensor:  # [B] -> [I + L B]
        """A value of each sample for every row of `summaries`."""
        return torch.cat([values[self.mix.sample], *(values for _ in self.local_numbers)])

    @torch.no_grad()
    def target_embedding(self, encoder: str, view: int) -> Tensor:  # [I, P]
        tokens = self.target_tokens(encoder, view, "every")
        return self.encoders[encoder].summarise(tokens).mean(1)

    def target_tokens(self, encoder: str, view: int, rows: Rows) -> Tensor:  # [R, N, C]
        source = encoder, view
        tokens, found = self.targets.tokens[source], self.targets.rows[source]
        if rows == found:
            return tokens
        if found == "every":
            assert rows != "every"
            return tokens[self.mix.asked(rows)]
        assert found == "all" and rows != "every"
        return tokens[: self.mix.num_asked] if rows == "first" else tokens[-self.mix.num_asked :]


Monitor = Callable[[str, Tensor], None]
"""Takes a metric's name and value; what it is given is not differentiated."""
