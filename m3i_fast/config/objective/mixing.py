"""What the encoder is shown: which images share an input, and which of their cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from m3i_fast.config.fields import COUNTS, LEVELS, NUMBERS, SIDES, Checked, Conflict, unmet

Asked = Literal["first", "last", "all"]
Pattern = Literal["blocks", "rectangle"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig(Checked):
    """Choose which images share an input, which cells each shows, and which cells are predicted."""

    mode: Literal["joint", "own_image", "masked", "blend", "none"] = "joint"
    """joint: images share an input, and tokens attend to everything, as a CNN sees it (M3I, figure
    2); own_image: tokens attend within their own image (as MixMIM), which for the encoder is two
    masked images at the cost of one; masked: every input is one image of which some
    cells are hidden (as MAE); blend: two images of which each pixel is a weighted mean (as mixup);
    none: every input is one whole image."""
    num_images: Annotated[int, COUNTS] = 2
    """Images that share an input in own_image and joint, 2 to 4; blend: 2; masked and none: 1."""
    pattern: Pattern = "blocks"
    """Cells that an image gets: random blocks, or those around a random point (CutMix's rectangle,
    of exactly the image's share)."""
    mask_block: Annotated[int, SIDES] = 2
    """Side of the blocks that either pattern is made of, in tokens."""
    mask_ratio: float = 0.5
    """Share of the cells that masked hides at the first step."""
    final_mask_ratio: float = 0.5
    """The same at the last step; linear in between."""
    hidden: Literal["dropped", "mask_token"] = "dropped"
    """What the encoder gets of the cells that masked hides. dropped: nothing, which saves their
    share of its work (MAE); mask_token: a learnt token with the cell's position (BEiT, iBOT)."""
    mask_per_batch: bool = False
    """Draw the cells once for all inputs of a step (as MixMIM), alike on all ranks."""
    blend_alpha: float = 0.8
    """alpha of the Beta(alpha, alpha) that blend draws the first images' share from, once a step
    (as mixup), alike on all ranks."""
    num_queries: Annotated[int, NUMBERS] = 0
    """Cells that each dense term predicts per image; 0 predicts every cell that it may."""
    min_contrast: Annotated[int, LEVELS] = 0
    """Levels of 255 that a colour of a cell's pixels in the target view must span for the cell to
    be predicted, so that blank paper is no target; 0 takes every cell. Where an image has too few
    such cells, some are predicted again; where it has none, blank ones are."""
    dense_fraction: float = 1.0
    """Share of the inputs that dense terms predict for, the first of each batch. EMA encoder and
    decoder see no more, and each costs about as much as the encoder's pass."""
    token_dropout: float = 0.0
    """Share of caption tokens left out, never the first and last."""

    def place(self) -> str:
        return "mixing."

    def conflicts(self) -> Iterator[Conflict]:
        most, images = (2, "2 in mode blend") if self.mode == "blend" else (4, "2 to 4")
        return unmet(
            self,
            num_images=(2 <= self.num_images <= most, images),
            mask_ratio=(0 < self.mask_ratio < 1, "in (0, 1)"),
            final_mask_ratio=(0 < self.final_mask_ratio < 1, "in (0, 1)"),
            hidden=(
                self.hidden == "dropped" or self.mode == "masked",
                "dropped unless mode is masked",
            ),
            blend_alpha=(self.blend_alpha > 0, "> 0"),
            dense_fraction=(0 < self.dense_fraction <= 1, "in (0, 1]"),
            token_dropout=(0 <= self.token_dropout < 1, "in [0, 1)"),
        )

    @property
    def images_per_input(self) -> int:  # K
        """Return how many images share an input, 1 in modes masked and none."""
        return 1 if self.mode in ("masked", "none") else self.num_images

    @property
    def divides_cells(self) -> bool:
        """Return whether an image shows but some of the cells."""
        return self.mode not in ("blend", "none")

    @property
    def encodes_hidden(self) -> bool:
        """Return whether the encoder gives a token for each cell, of hidden ones a mask token's."""
        return self.hidden == "mask_token"

    @property
    def encodes_alone(self) -> bool:
        """Return whether the encoder is given the cells that an image shows and no others."""
        return self.mode in ("own_image", "masked") and not self.encodes_hidden

    def num_own(self, num_cells: int, progress: float) -> int:
        """Return the cells that an image shows; progress: 0 at the first step, 1 at the last."""
        if not self.divides_cells:
            return num_cells
        if self.mode == "masked":
            ratio = self.mask_ratio + (self.final_mask_ratio - self.mask_ratio) * progress
            return num_cells - round(ratio * num_cells)
        return num_cells // self.num_images

    def batch_conflicts(self, batch_size: int) -> Iterator[Conflict]:
        """Yield what keeps a batch of this size from being divided into inputs."""
        if batch_size < 1 or batch_size % self.images_per_input:
            yield (
                "data.batch_size",
                f"expected a multiple of {self.images_per_input}, the images an input of "
                f"objective.mixing.mode {self.mode}, got {batch_size}",
            )

    def grid_conflicts(self, grid: int) -> Iterator[Conflict]:
        """Yield what leaves an image without cells of this grid, or masked without hidden ones."""
        masked = self.mode == "masked"
        most = grid * grid - masked
        ratios = {"mask_ratio": 0.0, "final_mask_ratio": 1.0} if masked else {"num_images": 0.0}
        for name, progress in ratios.items():
            num_own = self.num_own(grid * grid, progress)
            if not 1 <= num_own <= most:
                yield (
                    f"objective.mixing.{name}",
                    f"expected to leave each image 1 to {most} cells of a {grid} x {grid} token "
                    f"grid, got {num_own}",
                )

    def cell_conflicts(self, *, alone: bool, multiple: int) -> Iterator[Conflict]:
        """Yield what keeps an encoder from being trained on these inputs.

        alone: it can encode the cells of one image as if the input held nothing else; multiple:
        tokens a side of its coarsest cell.
        """
        if self.mode in ("own_image", "masked") and not alone:
            yield (
                "objective.mixing.mode",
                f"expected joint, blend or none with a convolutional encoder, which cannot leave "
                f"tokens out, got {self.mode}",
            )
        if self.divides_cells and self.mask_block % multiple:
            yield (
                "objective.mixing.mask_block",
                f"expected a multiple of {multiple} tokens, the encoder's coarsest cell, got "
                f"{self.mask_block}",
            )
