"""How many inputs, images, cells and rows a training step has, from the configs.

Legend: B samples, I images in inputs, n cells an image shows, N cells of the grid, Q cells that a
dense term asks, m cells of a local view.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.objective import ObjectiveConfig, Term
from m3i_fast.objectives.step_context import Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """Of one rank's step."""

    vision: VisionConfig
    text: TextConfig
    objective: ObjectiveConfig
    num_classes: int
    batch_size: int
    """B, of this rank."""
    num_ranks: int = 1
    """Ranks whose rows meet in the likelihoods over all pairs."""
    num_local: int = 0
    local_size: int = 0
    chunk: int = 0
    """Rows that an encoder or decoder works on at a time, whose forward pass is then run twice."""
    teacher: VisionConfig | None = None
    """The frozen encoder, where a term asks one."""
    progress: float = 0.0
    """Of the run, 0 to 1: how many cells `masked` shows."""

    def encoder_of(self, term_encoder: str) -> VisionConfig:
        """Who encodes the target: the frozen teacher, or what the encoder itself is."""
        if term_encoder != "frozen":
            return self.vision
        assert self.teacher is not None  # step_flops
        return self.teacher

    @property
    def num_inputs(self) -> int:
        return self.batch_size // self.objective.mixing.images_per_input

    @property
    def num_images(self) -> int:  # I
        return self.num_inputs * self.objective.mixing.images_per_input

    @property
    def num_cells(self) -> int:  # N
        return int(self.vision.grid**2)

    @property
    def num_own(self) -> int:  # n
        return self.objective.mixing.num_own(self.num_cells, self.progress)

    @property
    def num_views(self) -> int:
        return 1 + any(term.sees_both_views for term in self.objective.active_terms)

    @property
    def num_local_cells(self) -> int:  # m
        return (self.local_size * self.vision.grid // self.vision.image_size) ** 2

    @property
    def num_summaries(self) -> int:
        """Rows of the labels' terms: every image in an input, and every local view."""
        return self.num_images + self.num_local * self.batch_size

    def num_asked(self, rows: Rows) -> int:
        """Images that a dense term asks, or that a target encoder sees."""
        mixing = self.objective.mixing
        asked = max(round(mixing.dense_fraction * self.num_inputs), 1)
        by_rows = {"all": asked * mixing.images_per_input, "every": self.num_images}
        return by_rows.get(rows, asked)

    def num_queries(self, term: Term) -> int:  # Q
        mixing = self.objective.mixing
        hidden = term.view == "same" and mixing.divides_cells
        most = self.num_cells - self.num_own * hidden
        return min(mixing.num_queries or most, most)
