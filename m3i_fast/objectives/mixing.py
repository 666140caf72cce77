"""Multi-input: which images share an input, which cells each shows, and which it has to predict.

Paper, figure 2. An input is made of K images: one with masked cells, two to four that share its
cells, two whose pixels are blended, or one whole image. Legend: B samples, P = B / K inputs,
I = K * P images in inputs (all first images, then all second ones), A inputs from which dense terms
predict, N cells of the token grid, n own cells that an image shows, Q cells a dense term predicts,
T caption tokens, L layers of the encoder.

A batch holds the images of an input one after the other. All that is drawn for an input or a sample
is a function of the seed and its position in the run, so that it is the same on any number of
ranks, in any batch and after any resume; the step decides schedules alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.config.fields import refuse
from m3i_fast.config.objective.mixing import Asked, MixingConfig
from m3i_fast.keyed_draws import Purpose, uniform, words
from m3i_fast.models.transformer.packing import to_device
from m3i_fast.models.transformer.ragged import Cells
from m3i_fast.objectives.mask_patterns import Uniform, deal_cells


@dataclass(frozen=True, slots=True)
class Mix:
    """The random draws of one batch: images of an input, cells, caption tokens, branches."""

    members: Tensor  # [P, K] int64, samples in an input
    choice: Tensor  # [P, grid, grid] uint8, the column of members a cell shows; [P, 1, 1] undivided
    sample: Tensor  # [I] int64, the sample of each image
    token_index: Tensor  # [I, n] int64, ascending, the image's own cells
    own_query: Tensor  # [K * A, Q] int64, hidden cells to predict of the image's own view
    other_query: Tensor  # [K * A, Q] int64, any cells, to predict of another view
    # With min_contrast both hold all cells that may be predicted, in random order.
    token_priority: Tensor  # [B, T] fp32, uniform: caption tokens below the rate are dropped
    num_asked: int  # A
    share: Tensor | None = None  # [P] fp32, weight of the first image in a blend; all equal
    branch_priority: Tensor | None = None  # [rows that the encoder encodes, 2 L] int32
    local_branch_priority: Tensor | None = None  # [rows of local views, 2 L] int32
    # As `DropPath` takes them; None where no branch is dropped.
    slice_key: Tensor | None = None  # [] int64, of the step's random directions, alike on all ranks

    @property
    def num_inputs(self) -> int:
        """Number P of inputs."""
        return self.members.shape[0]

    def asked(self, which: Asked) -> Tensor:  # [A] int64, or [K * A] of all
        """Return the images from which dense terms predict, of the first A inputs.

        which: first, last or all images of an input. With all, image 0 of each input comes first,
        then image 1 of each, and so on. Raises ValueError for another `which`.
        """
        rows = torch.arange(self.sample.shape[0], device=self.sample.device)
        return _of_images(rows.view(-1, self.num_inputs)[:, : self.num_asked], which)

    def take(self, values: Tensor, which: Asked) -> Tensor:  # [I, ...] -> [A, ...] or [K * A, ...]
        """Return the rows `asked(which)` of the images' values, without a copy where it can be."""
        if which == "all" and self.num_asked < self.num_inputs:
            return values[self.asked(which)]
        first = self.sample.shape[0] - self.num_inputs if which == "last" else 0
        return values if which == "all" else values[first : first + self.num_asked]

    def queries(self, which: Asked, *, own: bool) -> Tensor:  # [A, Q] int64, or [K * A, Q] of all
        """Return the cells to predict from images `asked(which)`, of their own or another view."""
        cells = self.own_query if own else self.other_query
        return _of_images(cells.unflatten(0, (-1, self.num_asked)), which)

    def take_cells(self, cells: Cells, which: Asked) -> Cells:  # [I, n, ...] -> [A, n, ...]
        """Return the cells of images `asked(which)`, which a mix of squares takes as any rows."""
        assert isinstance(cells, Tensor)
        return self.take(cells, which)

    def own_cells(self, which: Asked) -> Cells:  # [A, n] int64
        """Return the cells of the first view that images `asked(which)` show."""
        return self.take_cells(self.token_index, which)

    def queries_of(self, view: int, which: Asked, *, own: bool) -> Cells:  # [A, Q] int64
        """Return the cells of a view to predict, `queries`: those of squares are alike in all."""
        return self.queries(which, own=own)

    def to(self, device: torch.device) -> Mix:
        """Copy to `device` asynchronously, through pinned memory for a GPU."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: to_device(value, device)
            for name, value in held.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def draw_mix(
    cfg: MixingConfig,
    *,
    position: Tensor,  # [B] int64 on the CPU, of each sample in the run
    first_position: int,
    grid: int,
    context_length: int,
    seed: int,
    step: int,
    num_steps: int,
) -> Mix:
    """Draw which cells each image of an input shows and which it has to predict.

    Input p has the samples K p to K p + K - 1. Cells left over where K does not divide N show the
    first image and count as no image's own. What is drawn for an input is keyed by the position of
    its first sample, what is drawn for an image by its own; with `mask_per_batch`, and the share of
    a blend, by first_position: the position at which the step begins, alike on all ranks.

    Raises ValueError where K does not divide the batch, where the grid cannot be divided among the
    images, or where `step` is not in [0, num_steps).
    """
    batch_size = len(position)
    refuse(cfg.batch_conflicts(batch_size))
    refuse(cfg.grid_conflicts(grid))
    if not 0 <= step < num_steps:
        raise ValueError(f"step: expected 0 <= step < num_steps = {num_steps}, got {step}")
    draws = Draws(seed, position.numpy(), first_position)
    members = torch.arange(batch_size).view(-1, cfg.images_per_input)
    num_inputs, num_images = members.shape
    cells = _own_cells(cfg, num_inputs, grid, step / max(num_steps - 1, 1), draws)
    own = torch.zeros(num_images, num_inputs, grid * grid, dtype=torch.bool)
    own.scatter_(2, cells, True)
    choice = torch.zeros(num_inputs, 1, 1, dtype=torch.uint8)
    if cfg.divides_cells and num_images > 1:
        column = torch.arange(num_images, dtype=torch.uint8)[:, None, None]
        choice = (own * column).sum(0, dtype=torch.uint8).view(-1, grid, grid)
    num_asked = max(round(cfg.dense_fraction * num_inputs), 1)
    every, hidden = torch.ones_like(own[:, :num_asked]), ~own[:, :num_asked]
    asked = members[:num_asked].T.reshape(-1).numpy()
    own_draws = draws.of_samples(asked, Purpose.OWN_QUERIES)
    other_draws = draws.of_samples(asked, Purpose.OTHER_QUERIES)
    return Mix(
        members=members,
        choice=choice,
        sample=members.T.reshape(-1),
        token_index=cells.flatten(0, 1).contiguous(),  # pinned memory takes no expanded tensor
        own_query=_choose(hidden if cfg.divides_cells else every, cfg, own_draws),
        other_query=_choose(every, cfg, other_draws),
        token_priority=draws.of_samples(slice(None), Purpose.TOKEN_DROP)(context_length),
        num_asked=num_asked,
        share=draws.share(cfg, num_inputs) if cfg.mode == "blend" else None,
    )


def draw_branch_priority(
    cfg: MixingConfig,
    *,
    position: Tensor,  # [B] int64 on the CPU, of each sample in the run
    num_views: int,
    num_local: int,
    num_layers: int,
    seed: int,
) -> tuple[Tensor, Tensor | None]:  # [rows, 2 L], [num_local * B, 2 L] int32
    """Draw which residual branches of an encoder are dropped (stochastic depth).

    Rows are in the order in which the objective encodes them: by image of the input where each is
    encoded alone, then by view, then by input; those of local views by view, then by sample. Each
    is keyed by the position of its sample, or of its input's first one. None without local views.
    """
    members = position.view(-1, cfg.images_per_input).T.numpy()
    if cfg.mode != "own_image":  # an input is one row a view
        members = members[:1]

    def priorities(keys: NDArray[np.int64], count: int, purpose: Purpose) -> Tensor:
        drawn = uniform(keys, count * 2 * num_layers, seed=seed, purpose=purpose)
        return torch.from_numpy((drawn * np.float32(2**24)).astype(np.int32))

    rows = priorities(members.reshape(-1), num_views, Purpose.DROP_PATH)
    rows = rows.view(*members.shape, num_views, 2 * num_layers).transpose(1, 2)
    if not num_local:
        return rows.flatten(0, 2).contiguous(), None
    local = priorities(position.numpy(), num_local, Purpose.DROP_PATH_LOCAL)
    local = local.view(-1, num_local, 2 * num_layers).transpose(0, 1)
    return rows.flatten(0, 2).contiguous(), local.flatten(0, 1).contiguous()


def draw_slice_key(first_position: int, seed: int) -> Tensor:  # [] int64
    """Draw what the random directions of a step follow from, alike on all ranks.

    first_position: that at which the step begins.
    """
    key = words(np.array([first_position]), 1, seed=seed, purpose=Purpose.SLICES)
    return torch.from_numpy(key.view(np.int64))[0, 0]


def drop_tokens(
    token_ids: Tensor,  # [B, T] int
    num_tokens: Tensor,  # [B] int64
    priority: Tensor,  # [B, T] fp32, uniform in [0, 1)
    rate: float,
) -> tuple[Tensor, Tensor]:  # [B, T], [B]
    """Drop caption tokens whose priority is below `rate`, close the gaps, and pad with zeros.

    The first and the last token of a caption are kept. Does not synchronise with the host.
    """
    position = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    last = num_tokens[:, None] - 1
    inside = position <= last
    keep = inside & ((priority >= rate) | (position == 0) | (position == last))
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    kept_ids = token_ids.masked_fill(~keep, 0).gather(1, order)
    return kept_ids, keep.sum(1)


@dataclass(frozen=True, slots=True)
class Draws:
    """The random numbers of a batch, by what they are keyed by and for what they are."""

    seed: int
    position: NDArray[np.int64]  # [B]
    first_position: int  # of the step

    def of_samples(self, rows: NDArray[np.int64] | slice, purpose: Purpose) -> Uniform:
        """Return the source of the samples in these rows of the batch, a draw each."""
        return partial(self._uniform, self.position[rows], purpose)

    def of_step(self, purpose: Purpose) -> Uniform:
        """Return the source of a draw that all inputs of a step share."""
        return partial(self._uniform, np.array([self.first_position]), purpose)

    def share(self, cfg: MixingConfig, num_inputs: int) -> Tensor:  # [P] fp32
        """Draw the share of the first images of a blend, once for a step."""
        key = words(np.array([self.first_position]), 1, seed=self.seed, purpose=Purpose.BLEND)
        rng = np.random.default_rng(int(key[0, 0]))  # torch's Beta takes no generator
        return torch.full((num_inputs,), rng.beta(cfg.blend_alpha, cfg.blend_alpha))

    def _uniform(self, position: NDArray[np.int64], purpose: Purpose, count: int) -> Tensor:
        return torch.from_numpy(uniform(position, count, seed=self.seed, purpose=purpose))


def _own_cells(
    cfg: MixingConfig, num_inputs: int, grid: int, progress: float, draws: Draws
) -> Tensor:  # [K, P, n] int64, ascending
    num_own = cfg.num_own(grid * grid, progress)
    if not cfg.divides_cells:
        return torch.arange(num_own).expand(cfg.images_per_input, num_inputs, -1)
    firsts = slice(None, None, cfg.images_per_input)
    cells = deal_cells(
        cfg.pattern,
        num_images=cfg.images_per_input,
        num_own=num_own,
        grid=(grid, grid),
        block=cfg.mask_block,
        uniform=draws.of_step(Purpose.CELLS)
        if cfg.mask_per_batch
        else draws.of_samples(firsts, Purpose.CELLS),
    )
    return cells.expand(-1, num_inputs, -1)


def _choose(
    among: Tensor,  # [K, A, N] bool, as many in each row
    cfg: MixingConfig,
    uniform: Uniform,
) -> Tensor:  # [K * A, Q] int64
    rows = among.flatten(0, 1)
    cells = rows.nonzero()[:, 1].view(len(rows), -1)
    if not cfg.min_contrast and not 0 < cfg.num_queries < cells.shape[1]:
        return cells
    pick = uniform(cells.shape[1]).argsort(dim=1, stable=True)
    # Contrasts are known on the device only, so that the cells are selected there.
    return cells.gather(1, pick if cfg.min_contrast else pick[:, : cfg.num_queries])


def _of_images(rows: Tensor, which: Asked) -> Tensor:  # [K, A, ...] -> [A or K * A, ...]
    match which:
        case "first":
            return rows[0]
        case "last":
            return rows[-1]
        case "all":
            return rows.flatten(0, 1)
    raise ValueError(f"which: expected first, last or all, got {which}")
