"""Which cells of pictures of any shape are shown, and which are to be predicted.

A masked picture's cells are drawn over its own grid. Images that share an input have grids of their
own: the cells of the first one are dealt as a square's are, which divides the unit square, and a
cell of another image is its own where its centre lies in that image's part. So grids that are alike
are divided as squares.
Legend: B samples, V global views, K images of an input, P inputs, I = K P images (all first images,
then all second ones), A inputs from which dense terms predict, M cells of the largest grid, G
pictures with one grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.fields import refuse
from m3i_fast.config.objective.mixing import Asked, MixingConfig
from m3i_fast.keyed_draws import Purpose
from m3i_fast.models.encoder import PackedCells
from m3i_fast.models.transformer.packing import to_device
from m3i_fast.models.transformer.ragged import Cells, Ragged, joined
from m3i_fast.objectives.mask_patterns import NOBODY, deal_grids
from m3i_fast.objectives.mixing import Draws, Mix
from m3i_fast.objectives.step_context import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewCells:
    """The cells of one global view of all images: numbers, row by row, in their pictures' grids."""

    grids: Tensor  # [I, 2] int64, on the CPU
    starts: Tensor  # [I] int64, on the CPU: patches of the batch's view before each picture's
    inputs: PackedCells  # T cells that the encoder gets
    patches: Tensor | None  # [T] int64, their patches among those of the view; None: all in order
    back: Tensor | None  # [T'] int64, the encoder's tokens that are the images' own; None: all
    lengths: tuple[int, ...]  # I: tokens of each image, T' in all
    own: Ragged  # I: cells that are the image's own; the tokens' where hidden cells are dropped
    own_query: Ragged  # K A: hidden cells, to predict of the input's own view
    other_query: Ragged  # K A: any cells, to predict of this view from another one
    # With min_contrast both hold all cells that may be predicted, in random order.

    def to(self, device: torch.device) -> ViewCells:
        """Copy to the device without waiting; what is of the host stays there."""

        def moved(value: Any) -> Any:
            return to_device(value, device) if isinstance(value, Tensor) else value

        return replace(
            self,
            inputs=PackedCells(*map(moved, self.inputs)),
            patches=moved(self.patches),
            back=moved(self.back),
            own=self.own.to(device),
            own_query=self.own_query.to(device),
            other_query=self.other_query.to(device),
        )


@dataclass(frozen=True, slots=True)
class PackedMix(Mix):
    """The random draws of a batch of views of any shape.

    `cells` are in the place of the square's choice, token_index and queries, which are empty.
    """

    cells: tuple[ViewCells, ...] = ()  # of the first one or two global views

    def take_cells(self, cells: Cells, which: Asked) -> Cells:  # I -> A, or K A of all
        if isinstance(cells, Tensor):
            return self.take(cells, which)
        num_images = len(cells) // self.num_inputs
        chosen = {"first": [0], "last": [num_images - 1]}.get(which, range(num_images))
        return joined([cells.pictures(k * self.num_inputs, self.num_asked) for k in chosen])

    def own_cells(self, which: Asked) -> Cells:  # A, or K A of all
        return self.take_cells(self.cells[0].own, which)

    def queries_of(self, view: int, which: Asked, *, own: bool) -> Cells:  # A, or K A of all
        cells = self.cells[view].own_query if own else self.cells[view].other_query
        if which == "all":
            return cells
        return cells.pictures(
            0 if which == "first" else len(cells) - self.num_asked, self.num_asked
        )

    def rows(self, which: Rows) -> Tensor:  # [A], [K A] or [I] int64, on the CPU
        """Return the images that a target encoder sees, `asked(which)` or every one."""
        num_inputs = self.num_inputs
        images = torch.arange(len(self.sample)).view(-1, num_inputs)
        asked = images if which == "every" else images[:, : self.num_asked]
        return {"first": asked[0], "last": asked[-1]}.get(which, asked.flatten())

    def samples(self, which: Rows) -> Tensor:  # [A], [K A] or [I] int64, on the CPU
        """Return the samples of the images `rows(which)`."""
        rows, num_inputs = self.rows(which), self.num_inputs
        return rows % num_inputs * (len(self.sample) // num_inputs) + rows // num_inputs

    def to(self, device: torch.device) -> PackedMix:
        cells = tuple(view.to(device) for view in self.cells)
        moved = Mix.to(self, device)
        assert isinstance(moved, PackedMix)
        return replace(moved, cells=cells)


def draw_packed_mix(
    cfg: MixingConfig,
    *,
    grids: Tensor,  # [B, V, 2] int64 on the CPU: rows and columns of each global view
    position: Tensor,  # [B] int64 on the CPU, of each sample in the run
    first_position: int,
    context_length: int,
    seed: int,
    step: int,
    num_steps: int,
) -> PackedMix:
    """Draw which cells of pictures of any shape are shown and predicted, as `draw_mix` of squares.

    Everything is keyed as there, and views of a picture whose grids are alike have the same cells.
    Each image shows a cell or more, and hides one or more where cells are divided.

    Raises ValueError where K does not divide the batch, for images that are blended, for grids of a
    single cell where cells are divided, or where `step` is not in [0, num_steps).
    """
    refuse(cfg.batch_conflicts(len(position)))
    if cfg.mode == "blend":
        raise ValueError(
            "objective.mixing.mode: expected joint, own_image, masked or none for views of any "
            "size, whose pixels cannot be blended, got blend"
        )
    if not 0 <= step < num_steps:
        raise ValueError(f"step: expected 0 <= step < num_steps = {num_steps}, got {step}")
    if cfg.divides_cells and int(grids.prod(-1).min()) < 2:
        raise ValueError("grids: expected 2 cells or more of which some are hidden, got 1")
    draws = Draws(seed, position.numpy(), first_position)
    members = torch.arange(len(position)).view(-1, cfg.images_per_input)
    sample = members.T.reshape(-1)
    num_asked = max(round(cfg.dense_fraction * len(members)), 1)
    none = torch.empty(0, 0, dtype=torch.int64)
    drawing = _Drawing(cfg, members, num_asked, step / max(num_steps - 1, 1), draws)
    return PackedMix(
        members=members,
        choice=torch.empty(0, 0, 0, dtype=torch.uint8),
        sample=sample,
        token_index=none,
        own_query=none,
        other_query=none,
        token_priority=draws.of_samples(slice(None), Purpose.TOKEN_DROP)(context_length),
        num_asked=num_asked,
        cells=tuple(drawing.view(of_view) for of_view in grids.unbind(1)[:2]),
    )


@dataclass(frozen=True, slots=True)
class _Drawing:
    """What the cells of a view are drawn by."""

    cfg: MixingConfig
    members: Tensor  # [P, K]
    num_asked: int
    progress: float
    draws: Draws

    def view(self, of_samples: Tensor) -> ViewCells:  # [B, 2]
        """Draw the cells of a view of all images."""
        cfg, sample = self.cfg, self.members.T.reshape(-1)
        grids, lengths = of_samples[sample], of_samples.prod(1)
        starts = (lengths.cumsum(0) - lengths)[sample]
        inside = torch.arange(int(lengths.max())) < lengths[sample][:, None]  # [I, M]
        own = shown = inside
        if cfg.mode == "masked":
            own = shown = self._masked(grids, inside)
        elif cfg.divides_cells:
            part = self._parts(grids, inside)
            image = torch.arange(cfg.images_per_input).repeat_interleave(len(self.members))
            own = _some(part == image[:, None], inside)
            left = (part == NOBODY) & (image == 0)[:, None] & inside  # seen, and nobody's own
            shown = own | left if cfg.mode == "joint" else own
        if cfg.encodes_hidden:
            shown = inside
        asked = torch.arange(len(grids)).view(cfg.images_per_input, -1)[:, : self.num_asked]
        other = self._choose(inside, asked.flatten(), Purpose.OTHER_QUERIES)
        query = other
        if cfg.divides_cells or cfg.min_contrast or cfg.num_queries:
            hidden = inside & ~own if cfg.divides_cells else inside
            query = self._choose(hidden, asked.flatten(), Purpose.OWN_QUERIES)
        return ViewCells(
            grids=grids,
            starts=starts,
            **self._inputs(grids, starts, shown, own),
            lengths=tuple((shown if cfg.encodes_hidden else own).sum(1).tolist()),
            own=_listed(own),
            own_query=query,
            other_query=other,
        )

    def _inputs(self, grids: Tensor, starts: Tensor, shown: Tensor, own: Tensor) -> dict[str, Any]:
        """Return `inputs`, `patches` and `back` of a view; shown, own: [I, M] bool."""
        cfg, num_inputs = self.cfg, len(self.members)
        image, cell = shown.nonzero().unbind(1)
        is_own, lengths = own[shown], shown.sum(1)
        back = None
        if cfg.mode == "joint":  # the images of an input side by side
            order = (image % num_inputs).argsort(stable=True)
            image, cell = image[order], cell[order]
            back = order.argsort()[is_own]
            lengths = lengths.view(-1, num_inputs).sum(0)
        extent, patches = grids[image], starts[image] + cell
        in_order = len(patches) == int(grids.prod(1).sum()) and bool((patches.diff() == 1).all())
        inputs = PackedCells(
            lengths.tolist(),
            torch.stack([cell // extent[:, 1], cell % extent[:, 1]], 1),
            extent,
            int(grids.max()),
            ~is_own if cfg.encodes_hidden else None,
        )
        return {"inputs": inputs, "patches": None if in_order else patches, "back": back}

    def _masked(self, grids: Tensor, inside: Tensor) -> Tensor:  # [I, M] bool
        """Draw the cells that each image shows over its own grid."""
        count = grids.prod(1)
        num_own = torch.minimum(self._num_own(count).clamp_min(1), count - 1)
        return self._deal(grids, num_own, 1) == 0

    def _parts(self, grids: Tensor, inside: Tensor) -> Tensor:  # [I, M] int64
        """Return the number of the image in whose part of the first one's grid each cell lies."""
        num_inputs, num_images = self.members.shape
        first = grids[:num_inputs]
        part_of_first = self._deal(first, self._num_own(first.prod(1)), num_images)
        first = first.repeat(num_images, 1)
        index = torch.arange(inside.shape[1])
        place = [index // grids[:, 1:], index % grids[:, 1:]]
        # The centre (2 i + 1) / (2 n) of a side is in cell floor(m (2 i + 1) / (2 n)) of m cells.
        row, column = (
            (2 * own + 1) * first[:, axis, None] // (2 * grids[:, axis, None])
            for axis, own in enumerate(place)
        )
        seen = (row * first[:, 1:] + column).masked_fill(~inside, 0)
        return part_of_first.repeat(num_images, 1).gather(1, seen).masked_fill(~inside, NOBODY)

    def _num_own(self, count: Tensor) -> Tensor:  # [P] -> [P] int64
        """Return the cells that are an image's own of so many."""
        kinds, which = count.unique(return_inverse=True)
        own = [self.cfg.num_own(each, self.progress) for each in kinds.tolist()]
        return torch.tensor(own)[which]

    def _deal(self, grids: Tensor, num_own: Tensor, num_images: int) -> Tensor:  # [P, M] int64
        cfg, firsts = self.cfg, self.members[:, 0].numpy()
        part = deal_grids(
            cfg.pattern,
            num_images=num_images,
            num_own=num_own,
            grids=grids,
            block=cfg.mask_block,
            uniform=self.draws.of_step(Purpose.CELLS)
            if cfg.mask_per_batch
            else self.draws.of_samples(firsts, Purpose.CELLS),
        )
        return part.expand(len(grids), -1)

    def _choose(self, among: Tensor, asked: Tensor, purpose: Purpose) -> Ragged:
        """Choose cells to predict of the images asked, `num_queries` of them where there are."""
        among, cfg = among[asked], self.cfg
        counts = among.sum(1)
        # Contrasts are known on the device only, so that the cells are selected there.
        most = int(counts.max()) if cfg.min_contrast else cfg.num_queries
        if not cfg.min_contrast and not 0 < most < int(counts.max()):
            return _listed(among)
        uniform = self.draws.of_samples(self.members.T.reshape(-1)[asked].numpy(), purpose)
        place = torch.arange(int(counts.max()))
        drawn = uniform(len(place)).masked_fill(place >= counts[:, None], 2.0)  # of [0, 1)
        pick = drawn.argsort(dim=1, stable=True)[:, :most]
        cells = among.to(torch.uint8).argsort(dim=1, descending=True, stable=True).gather(1, pick)
        lengths = counts.clamp(max=most)
        return Ragged(cells[torch.arange(most) < lengths[:, None]], tuple(lengths.tolist()))


def _some(own: Tensor, inside: Tensor) -> Tensor:  # [I, M] bool, [I, M] bool
    """Give an image without a cell its middle one, and take one from an image that has all."""
    counts = inside.sum(1)
    rows = torch.arange(len(own))
    own = own.clone()
    own[rows, counts // 2] |= ~own.any(1)
    own[rows, counts - 1] &= own.sum(1) < counts
    return own


def _listed(cells: Tensor) -> Ragged:  # [R, M] bool
    """Return the numbers of the cells of each row that are set, ascending."""
    return Ragged(cells.nonzero()[:, 1], tuple(cells.sum(1).tolist()))
