"""Multi-input: which images share an input, which cells each shows, and which it has to predict.

Paper, figure 2. An input is made of K images: one with masked cells, two to four that share its
cells, two whose pixels are blended, or one whole image. Legend: B samples, P = B / K inputs,
I = K * P images in inputs (all first images, then all second ones), A inputs from which dense terms
predict, N cells of the token grid, n own cells that an image shows, Q cells a dense term predicts,
T caption tokens. All random draws depend on (seed, step) alone, so that resuming needs only the
step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m3i_fast.config.fields import refuse
from m3i_fast.config.mixing import Asked, MixingConfig
from m3i_fast.objectives.mask_patterns import deal_cells


@dataclass(frozen=True, slots=True)
class Mix:
    """The random draws of one step: pairs of images, cells, and caption tokens."""

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

    def queries(self, which: Asked, *, own: bool) -> Tensor:  # [A, Q] int64, or [K * A, Q] of all
        """Return the cells to predict from images `asked(which)`, of their own or another view."""
        cells = self.own_query if own else self.other_query
        return _of_images(cells.unflatten(0, (-1, self.num_asked)), which)

    def to(self, device: torch.device) -> Mix:
        """Copy to `device` asynchronously, through pinned memory for a GPU."""

        def moved(value: Tensor | int | None) -> Tensor | int | None:
            if not isinstance(value, Tensor):
                return value
            value = value.pin_memory() if device.type == "cuda" else value
            return value.to(device, non_blocking=True)

        return Mix(**{name: moved(getattr(self, name)) for name in self.__slots__})  # type: ignore[arg-type]


def draw_mix(
    cfg: MixingConfig,
    *,
    batch_size: int,
    grid: int,
    context_length: int,
    seed: int,
    step: int,
    num_steps: int,
) -> Mix:
    """Draw which samples share an input, which cells each shows and which it has to predict.

    Input p has sample p and one of each next P samples, counted from their end and from their
    beginning in turn: p and B - 1 - p for K = 2. Cells left over where K does not divide N show
    the first image and count as no image's own.

    Raises ValueError where K does not divide the batch, where the grid cannot be divided among the
    images, or where `step` is not in [0, num_steps).
    """
    refuse(cfg.batch_conflicts(batch_size))
    refuse(cfg.grid_conflicts(grid))
    if not 0 <= step < num_steps:
        raise ValueError(f"step: expected 0 <= step < num_steps = {num_steps}, got {step}")
    rng = torch.Generator().manual_seed(step_seed(seed, step))
    members = _share_out(batch_size, cfg.images_per_input)
    num_inputs, num_images = members.shape
    cells = _own_cells(cfg, num_inputs, grid, step / max(num_steps - 1, 1), rng)
    own = torch.zeros(num_images, num_inputs, grid * grid, dtype=torch.bool)
    own.scatter_(2, cells, True)
    choice = torch.zeros(num_inputs, 1, 1, dtype=torch.uint8)
    if cfg.divides_cells and num_images > 1:
        column = torch.arange(num_images, dtype=torch.uint8)[:, None, None]
        choice = (own * column).sum(0, dtype=torch.uint8).view(-1, grid, grid)
    num_asked = max(round(cfg.dense_fraction * num_inputs), 1)
    every = torch.ones_like(own[:, :num_asked])
    return Mix(
        members=members,
        choice=choice,
        sample=members.T.reshape(-1),
        token_index=cells.flatten(0, 1).contiguous(),  # pinned memory takes no expanded tensor
        own_query=_choose(~own[:, :num_asked] if cfg.divides_cells else every, cfg, rng),
        other_query=_choose(every, cfg, rng),
        token_priority=torch.rand(batch_size, context_length, generator=rng),
        num_asked=num_asked,
        share=_draw_share(cfg, num_inputs, seed, step) if cfg.mode == "blend" else None,
    )


def step_seed(seed: int, step: int) -> int:
    """Derive the seed of a generator for one step of a run.

    Hashed to 32 bits: torch's CPU generator ignores any higher ones.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest(), "big")


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


def _share_out(batch_size: int, num_images: int) -> Tensor:  # [P, K] int64
    """Put blocks of P samples side by side, every other one in reverse order."""
    blocks = torch.arange(batch_size).view(num_images, -1)
    return torch.stack([b.flip(0) if k % 2 else b for k, b in enumerate(blocks)], 1)


def _own_cells(
    cfg: MixingConfig, num_inputs: int, grid: int, progress: float, rng: torch.Generator
) -> Tensor:  # [K, P, n] int64, ascending
    num_own = cfg.num_own(grid * grid, progress)
    if not cfg.divides_cells:
        return torch.arange(num_own).expand(cfg.images_per_input, num_inputs, -1)
    cells = deal_cells(
        cfg.pattern,
        num_draws=1 if cfg.mask_per_batch else num_inputs,
        num_images=cfg.images_per_input,
        num_own=num_own,
        grid=grid,
        block=cfg.mask_block,
        rng=rng,
    )
    return cells.expand(-1, num_inputs, -1)


def _draw_share(cfg: MixingConfig, num_inputs: int, seed: int, step: int) -> Tensor:  # [P] fp32
    rng = np.random.default_rng(step_seed(seed, step))  # torch's Beta takes no generator
    return torch.full((num_inputs,), rng.beta(cfg.blend_alpha, cfg.blend_alpha))


def _choose(
    among: Tensor,  # [K, A, N] bool, as many in each row
    cfg: MixingConfig,
    rng: torch.Generator,
) -> Tensor:  # [K * A, Q] int64
    rows = among.flatten(0, 1)
    cells = rows.nonzero()[:, 1].view(len(rows), -1)
    if not cfg.min_contrast and not 0 < cfg.num_queries < cells.shape[1]:
        return cells
    pick = torch.rand(cells.shape, generator=rng).argsort(1)
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
