"""How many inputs, images, cells and rows a training step has, from the configs.

Legend: B samples, I images in inputs, n cells an image shows, N cells of the grid, Q cells that a
dense term asks, m cells of a local view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from m3i_fast.config.columns import REGION_WIDTH, ColumnConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.costs.packed_pictures import PackedPictures, Shown
from m3i_fast.objectives.step_context import Rows

SCALE = 1024
"""Samples for each one of views of any shape that are counted by their numbers of cells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCounts:
    """Count the inputs, images, cells and rows of one rank's step."""

    vision: VisionConfig
    text: TextConfig
    objective: ObjectiveConfig
    num_classes: int
    columns: tuple[ColumnConfig, ...] = ()
    """Named columns of the data."""
    batch_size: int
    """Samples of this rank, B."""
    num_ranks: int = 1
    """Ranks whose rows are gathered by the losses over all pairs."""
    num_local: int = 0
    local_size: int = 0
    num_regions: int = 1
    """Regions that a view may have, of each column of regions."""
    encoder_grad: bool = True
    """Whether the image encoder trains; a frozen one has no backward pass."""
    chunk: int = 0
    """Rows that an encoder or decoder takes at a time, in two forward passes; 0: all, in one."""
    teachers: Mapping[str, VisionConfig] = field(default_factory=dict)
    """Configs of the frozen encoders, by `Term.target_encoder`."""
    progress: float = 0.0
    """Progress of the run, 0 to 1, by which `masked` shows more or fewer cells."""
    collects: bool = True
    """Whether the run is in the steps of which PHI-S takes statistics."""
    pictures: PackedPictures | None = None
    """Views of any shape; None: squares of one size."""
    cells: int = 0
    """Cells of a global view of any shape; 0: those of the encoder's grid."""
    local_cells: int = 0
    """Cells of a local view of any shape; 0: those of a square of `local_size`."""

    def encoder_of(self, target_encoder: str) -> VisionConfig:
        """Return the config of a target's encoder: a frozen teacher's or the trained one's."""
        frozen = target_encoder.startswith("frozen")
        return self.teachers[target_encoder] if frozen else self.vision

    def num_names(self, term: Term) -> int:
        """Return the classes, labels or numbers of the column that a term names, or else classes.

        Raises ValueError where there is no such column.
        """
        if not term.column:
            return self.num_classes
        for column in self.columns:
            if column.name == term.column:
                return column.num_names
        raise ValueError(
            f"term {term.name!r}: column: expected one of {[c.name for c in self.columns]}, got "
            f"{term.column!r}"
        )

    @property
    def encoded_views(self) -> list[int]:
        """Return the views that the trained encoder sees, of all of a sample's, local ones last."""
        num_global = (
            len(self.pictures.lengths) - self.num_local if self.pictures else self.num_views
        )
        return [*range(self.num_views), *range(num_global, num_global + self.num_local)]

    @property
    def shown(self) -> Shown:
        """Return what the trained encoder is shown of views of any shape."""
        num_global = self.encoded_views[-1] + 1 - self.num_local
        return Shown(mixing=self.objective.mixing, num_global=num_global, progress=self.progress)

    def of_alike(self, view: int) -> list[StepCounts]:
        """Return counts of views that have one number of cells, one for each number there is.

        view: the global view whose numbers are taken. Their samples are `SCALE` times as many as in
        all steps of the pictures, so that what is counted of them is whole.
        """
        assert self.pictures is not None
        images = self.objective.mixing.images_per_input
        return [
            replace(
                self, batch_size=count * SCALE * images, cells=cells, local_cells=self._mean_local
            )
            for cells, count in self.pictures.lengths[view].items()
        ]

    def of_mean(self) -> StepCounts:
        """Return the counts of views that have the mean number of cells each."""
        assert self.pictures is not None
        mean = self.pictures.mean_length(range(self.num_views))
        return replace(self, cells=mean, local_cells=self._mean_local)

    @property
    def _mean_local(self) -> int:
        if self.pictures is None or not self.num_local:
            return 0
        return self.pictures.mean_length(self.encoded_views[-self.num_local :])

    @property
    def num_inputs(self) -> int:
        """Return how many mixed inputs the batch makes."""
        return self.batch_size // self.objective.mixing.images_per_input

    @property
    def num_images(self) -> int:  # I
        """Return how many images the inputs hold."""
        return self.num_inputs * self.objective.mixing.images_per_input

    @property
    def num_cells(self) -> int:  # N
        """Return the cells of a view's grid."""
        return self.cells or int(self.vision.grid**2)

    @property
    def num_own(self) -> int:  # n
        """Return the cells that an image shows."""
        return self.objective.mixing.num_own(self.num_cells, self.progress)

    @property
    def num_tokens(self) -> int:
        """Return the tokens that the encoder gives for an image: of the cells shown, or of all."""
        return self.num_cells if self.objective.mixing.encodes_hidden else self.num_own

    @property
    def num_views(self) -> int:
        """Return how many global views the trained encoder sees, 1 or 2."""
        return self.objective.num_encoded_views

    @property
    def num_local_cells(self) -> int:  # m
        """Return the cells of a local view."""
        if self.local_cells:
            return self.local_cells
        return (self.local_size * self.vision.grid // self.vision.image_size) ** 2

    @property
    def num_summaries(self) -> int:
        """Return the rows of label terms: every image in an input, and every local view."""
        return self.num_images + self.num_local * self.batch_size

    @property
    def num_caption_tokens(self) -> int:
        """Return the tokens of a caption that are predicted: all but the first."""
        return self.text.context_length - 1

    @property
    def num_region_tokens(self) -> int:
        """Return the tokens of a region and its box that are predicted: all but the first."""
        return REGION_WIDTH - 1

    def num_asked(self, rows: Rows) -> int:
        """Return how many images a dense term asks, or a target encoder sees."""
        mixing = self.objective.mixing
        asked = max(round(mixing.dense_fraction * self.num_inputs), 1)
        by_rows = {"all": asked * mixing.images_per_input, "every": self.num_images}
        return by_rows.get(rows, asked)

    def num_queries(self, term: Term) -> int:  # Q
        """Return the cells that a dense term asks of an image."""
        mixing = self.objective.mixing
        hidden = term.view == "same" and mixing.divides_cells
        most = self.num_cells - self.num_own * hidden
        return min(mixing.num_queries or most, most)
