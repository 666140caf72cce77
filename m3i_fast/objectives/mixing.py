"""Multi-input: which images share an input, who shows which cells, and what each is asked.

Paper, figure 2. Legend: B samples, P mixed inputs, K images an input (2, or 1 without mixing),
I = K * P images in inputs, A inputs that dense terms are asked of, N cells of the token grid,
n = N / K cells an image shows, Q cells a dense term predicts, T caption tokens. Everything random
here is drawn from (seed, step) alone, so that resuming needs only the step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MixingConfig:
    mode: Literal["own_image", "joint", "none"] = "own_image"
    """own_image: two images share an input, tokens attend within their own image (as MixMIM);
    joint: they attend to
    everything (as a CNN sees it); none: every input is one whole image."""
    mask_block: int = 2
    """Side of a mask block, in tokens."""
    num_queries: int = 0
    """Cells that each dense term predicts an image; 0 predicts every cell it may."""
    dense_fraction: float = 1.0
    """Share of the inputs that dense terms are asked of: the EMA encoder and the decoder see no
    more, and each costs about as much as the encoder's pass."""
    token_dropout: float = 0.0
    """Share of caption tokens left out, never the first and last."""

    def __post_init__(self) -> None:
        if self.mask_block < 1:
            raise ValueError(f"mixing.mask_block: expected >= 1, got {self.mask_block}")
        if self.num_queries < 0:
            raise ValueError(f"mixing.num_queries: expected >= 0, got {self.num_queries}")
        if not 0 < self.dense_fraction <= 1:
            raise ValueError(
                f"mixing.dense_fraction: expected in (0, 1], got {self.dense_fraction}"
            )
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"mixing.token_dropout: expected in [0, 1), got {self.token_dropout}")

    @property
    def num_images(self) -> int:
        return 1 if self.mode == "none" else 2

    def check_grid(self, grid: int) -> None:
        """Raise ValueError unless a grid of `grid` x `grid` tokens can be halved."""
        if self.num_images == 2 and grid % 2:
            raise ValueError(
                f"objective.mixing.mode: {self.mode} gives each image half of the tokens; expected "
                f"an even token grid, got {grid} x {grid}; change vision.image_size or patch_size"
            )

    def check_cells(self, *, alone: bool, multiple: int) -> None:
        """Raise ValueError unless an encoder can be trained on these mixed inputs.

        alone: it can encode the cells of one image as if the input held nothing else; multiple:
        tokens a side of its coarsest cell.
        """
        if self.mode == "own_image" and not alone:
            raise ValueError(
                "objective.mixing.mode: own_image needs an encoder that can leave tokens out; "
                "expected joint or none for a convolutional one, got own_image"
            )
        if self.num_images == 2 and self.mask_block % multiple:
            raise ValueError(
                f"objective.mixing.mask_block: expected a multiple of {multiple} tokens, the "
                f"encoder's coarsest cell, got {self.mask_block}"
            )


@dataclass(frozen=True, slots=True)
class Mix:
    """One step's draw."""

    pairs: Tensor  # [P, 2] int64, samples in an input
    mask: Tensor  # [P, grid, grid] bool, True: the cell shows pairs[:, 0]; [P, 1, 1] unmixed
    sample: Tensor  # [I] int64, the sample of each image: all firsts, then all seconds
    token_index: Tensor  # [I, n] int64, cells of the token grid that show the image
    same_view_query: Tensor  # [A, Q] int64, cells asked of the first A images: none they show
    other_view_query: Tensor  # [A, Q] int64, cells of another view asked of the last P's first A
    token_priority: Tensor  # [B, T] fp32, uniform: caption tokens below the rate are left out

    @property
    def num_inputs(self) -> int:
        return self.pairs.shape[0]

    @property
    def same_view_rows(self) -> slice:
        """The images that are asked for their own view."""
        return slice(0, self.same_view_query.shape[0])

    @property
    def other_view_rows(self) -> slice:
        """The images that are asked for another view: partners of the former, where mixed."""
        first = self.sample.shape[0] - self.num_inputs
        return slice(first, first + self.other_view_query.shape[0])

    def to(self, device: torch.device) -> Mix:
        """Move without waiting: a copy to a GPU is asynchronous only from pinned memory."""
        fields = [getattr(self, name) for name in self.__slots__]
        if device.type == "cuda":
            fields = [field.pin_memory() for field in fields]
        return Mix(*(field.to(device, non_blocking=True) for field in fields))


def draw_mix(
    cfg: MixingConfig, *, batch_size: int, grid: int, context_length: int, seed: int, step: int
) -> Mix:
    """Pair sample i with B - 1 - i and give each of a pair half of the cells, in blocks.

    Raises ValueError when the batch is odd or the grid cannot be halved.
    """
    if cfg.num_images == 2 and batch_size % 2:
        raise ValueError(f"batch_size: expected an even number to mix pairs, got {batch_size}")
    cfg.check_grid(grid)
    rng = torch.Generator().manual_seed(step_seed(seed, step))
    num_cells = grid * grid
    if cfg.num_images == 1:
        sample = torch.arange(batch_size)
        pairs = torch.stack([sample, sample], 1)
        mask = torch.ones(batch_size, 1, 1, dtype=torch.bool)
        token_index = torch.arange(num_cells).expand(batch_size, -1)
        hidden = token_index
    else:
        first = torch.arange(batch_size // 2)
        pairs = torch.stack([first, batch_size - 1 - first], 1)
        sample = pairs.T.reshape(-1)
        shown, hidden = _halves(len(first), grid, cfg.mask_block, rng)
        token_index = torch.cat([shown, hidden])
        mask = torch.zeros(len(first), num_cells, dtype=torch.bool).scatter_(1, shown, True)
        mask = mask.view(-1, grid, grid)
    num_inputs = len(pairs)
    num_asked = max(round(cfg.dense_fraction * num_inputs), 1)
    every_cell = torch.arange(num_cells).expand(num_asked, -1)
    return Mix(
        pairs=pairs,
        mask=mask,
        sample=sample,
        token_index=token_index,
        same_view_query=_choose(hidden[:num_asked], cfg.num_queries, rng),
        other_view_query=_choose(every_cell, cfg.num_queries, rng),
        token_priority=torch.rand(batch_size, context_length, generator=rng),
    )


def step_seed(seed: int, step: int) -> int:
    """A generator's seed for one step of one run.

    Hashed to 32 bits: torch's CPU generator ignores any higher ones.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest(), "big")


def drop_tokens(
    token_ids: Tensor,  # [B, T] int
    num_tokens: Tensor,  # [B] int64
    priority: Tensor,  # [B, T] fp32, uniform in [0, 1)
    rate: float,
) -> tuple[Tensor, Tensor]:  # [B, T], [B]
    """Leave out caption tokens whose priority is below `rate`, close the gaps, and pad with zeros.

    The first and the last token of a caption stay. No host synchronisation.
    """
    position = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    last = num_tokens[:, None] - 1
    inside = position <= last
    keep = inside & ((priority >= rate) | (position == 0) | (position == last))
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    kept_ids = token_ids.masked_fill(~keep, 0).gather(1, order)
    return kept_ids, keep.sum(1)


def _halves(
    num_inputs: int, grid: int, block: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:  # [P, N / 2], [P, N / 2] int64, ascending
    """Split the cells of each grid in two halves, whole blocks first.

    A block in the middle is shared row by row.
    """
    line = torch.arange(grid) // block
    num_blocks = -(-grid // block)
    block_of_cell = (line[:, None] * num_blocks + line[None, :]).flatten()  # [N]
    rank = torch.rand(num_inputs, num_blocks**2, generator=rng).argsort(1)
    order = rank[:, block_of_cell].argsort(dim=1, stable=True)
    shown, hidden = order.chunk(2, 1)
    return shown.sort(1).values, hidden.sort(1).values


def _choose(cells: Tensor, count: int, rng: torch.Generator) -> Tensor:  # [P, c] -> [P, count or c]
    if count == 0 or count >= cells.shape[1]:
        return cells.contiguous()
    pick = torch.rand(cells.shape, generator=rng).argsort(1)[:, :count]
    return cells.gather(1, pick)
