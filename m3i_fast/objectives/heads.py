"""Predictors f_psi: heads that map the tokens of an image to its dense and global targets.

Legend: I images, n own tokens, C their width, Q target positions, D decoder width, N rows, K
prototypes, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.objective.heads import DecoderConfig, ProjectorConfig
from m3i_fast.models.batch_norm import BatchNorm
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Block, BlockLayers
from m3i_fast.models.transformer.layers import (
    INIT_STD,
    LAYER_NORM_EPS,
    Linear,
    Residual,
    reset_children,
)
from m3i_fast.models.transformer.packing import (
    Packed,
    Sequences,
    pack,
    sort_by_length,
    unpack,
)
from m3i_fast.models.transformer.positions import (
    grid_embedding,
    sincos_embedding,
    sincos_frequencies,
)
from m3i_fast.models.transformer.ragged import Ragged, joined
from m3i_fast.objectives.row_statistics import unit_rows, wide

LOG_SIZE_SCALE = 10.0  # SiameseIM embeds 10 ln(dh): the sines resolve steps of about 1


class Question(NamedTuple):
    """What a decoder is asked: targets at some positions, of images by their own tokens."""

    tokens: Tensor  # [I, n, C]
    token_index: Tensor  # [I, n] int64, the cells of the tokens
    position: Tensor  # [I, Q, 4] of the targets (`relative_positions`)


class PackedQuestion(NamedTuple):
    """What a decoder is asked of pictures of any shape, which have unequal numbers of tokens."""

    tokens: Ragged  # [T, C]
    place: Tensor  # [T, 2] int64, row and column of each token in its view
    position: Ragged  # [Q, 4] of the targets, in cells of the input view (`grid_positions`)


class DenseDecoder(nn.Module):
    """A decoder that predicts target features at given positions (M3I, figure 2).

    Transformer blocks run over an image's own tokens and mask tokens, one a target patch, which
    carry its relative position. `projector` is an identity where the config has none.
    """

    calls_apart = False
    """Whether questions are answered one by one: in chunks, or in CUDA graphs."""
    own_position: Tensor  # [input_grid ** 2, D] fp32
    frequencies: Tensor  # [D / 4] fp32

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        input_dim: int,
        output_dim: int,
        input_grid: int,
        layers: BlockLayers = TORCH_LAYERS,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.input_grid = input_grid
        self._row_multiple = layers.row_multiple
        self.projector: nn.Module = nn.Identity()
        if cfg.projector != "none":
            norm = cfg.projector == "batch_norm"
            self.projector = Mlp(
                *(input_dim, cfg.dim, cfg.dim),
                batch_norm=norm,
                output_norm=norm,
                process_group=process_group,
            )
            input_dim = cfg.dim
        self.embed = Linear(input_dim, cfg.dim)
        self.position = Linear(2 * cfg.dim, cfg.dim)
        self.blocks = nn.ModuleList(
            Block(cfg.dim, cfg.num_heads, mlp_ratio=cfg.mlp_ratio, layers=layers)
            for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, LAYER_NORM_EPS)
        self.head = Linear(cfg.dim, output_dim)
        self.mask_token = nn.Parameter(torch.empty(cfg.dim))
        self.register_buffer("own_position", torch.empty(input_grid**2, cfg.dim), persistent=False)
        self.register_buffer("frequencies", torch.empty(cfg.dim // 4), persistent=False)
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise every parameter and the position tables, as after `to_empty`."""
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.mask_token, std=INIT_STD)
        table = grid_embedding(self.input_grid, self.cfg.dim, self.own_position.device)
        self.own_position.copy_(table)
        self.frequencies.copy_(sincos_frequencies(self.cfg.dim, self.frequencies.device))

    def answer(self, questions: Sequence[Question]) -> list[Tensor]:  # [I, Q, output_dim] each
        """Predict the targets of several questions, with all products of all of them together.

        Each is a call by itself with a batch norm, whose statistics are those of a call, and where
        calls have to be apart (`calls_apart`).
        """
        if len(questions) == 1 or self.calls_apart or self.cfg.projector == "batch_norm":
            return [self(*question) for question in questions]
        return list(self(*(tuple(part) for part in zip(*questions, strict=True))))

    def answer_packed(self, questions: Sequence[PackedQuestion]) -> list[Ragged]:
        """Predict the targets of pictures of any shape, [Q, output_dim] of each question.

        Each picture's own tokens and mask tokens attend to one another alone, as `forward` of that
        picture. Questions are answered together as by `answer`.
        """
        apart = self.calls_apart or self.cfg.projector == "batch_norm"
        if len(questions) > 1 and apart:
            return [answer for each in questions for answer in self.answer_packed([each])]
        tokens, position = (
            joined([getattr(question, of) for question in questions])
            for of in ("tokens", "position")
        )
        frequencies = self.frequencies.float()  # those that `own_position` was made of
        place = torch.cat([question.place for question in questions])
        own = self.embed(self.projector(tokens.values))
        own = own + sincos_embedding(place, self.cfg.dim, frequencies)
        masked = self._masked(position.values).to(own.dtype)
        packing = sort_by_length(
            position.lengths,
            num_prefix=tokens.lengths,
            multiple=self._row_multiple,
            device=own.device,
        )
        last = packing.back[len(own) :]
        if num_padding := -len(masked) % self._row_multiple:
            last = torch.cat([last, last[:1].expand(num_padding)])
        stream = Residual(torch.cat([own, masked]).index_select(0, packing.order))
        for block in self.blocks[:-1]:
            stream = block(stream, packed=packing.packed)
        # The own tokens are not used after the last block.
        stream = self.blocks[-1](stream, packed=replace(packing.packed, last=last))
        answers = self.head(self.norm(stream.total())[: len(masked)])
        asked = [question.position for question in questions]
        parts = answers.split([len(each.values) for each in asked])
        return [each.with_values(part) for each, part in zip(asked, parts, strict=True)]

    def forward(
        self,
        tokens: Tensor | tuple[Tensor, ...],
        token_index: Tensor | tuple[Tensor, ...],
        position: Tensor | tuple[Tensor, ...],
    ) -> Tensor | tuple[Tensor, ...]:
        """Predict Q targets an image: [I, n, C] -> [I, Q, output_dim].

        token_index: [I, n] int64, the cells of the tokens. position: [I, Q, 4], py, px, ln(dh) and
        ln(dw) of the target patches (`relative_positions`). Tuples are of several questions, whose
        answers are a tuple.
        """
        if isinstance(tokens, tuple):
            assert isinstance(token_index, tuple) and isinstance(position, tuple)
            return self._answer_packed(tokens, token_index, position)
        assert isinstance(token_index, Tensor) and isinstance(position, Tensor)
        own = self._embed(self.projector(tokens), token_index)
        masked = self._masked(position)
        stream = Residual(torch.cat([own, masked.to(own.dtype)], dim=1))
        for block in self.blocks[:-1]:
            stream = block(stream)
        # The own tokens are not used after the last block.
        stream = self.blocks[-1](stream, num_last=masked.shape[1])
        return self.head(self.norm(stream.total()))

    def _answer_packed(
        self,
        tokens: tuple[Tensor, ...],
        token_index: tuple[Tensor, ...],
        position: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        shown = [Sequences(*part.shape[:2]) for part in tokens]
        asked = [Sequences(*part.shape[:2]) for part in position]
        index = torch.cat([part.flatten() for part in token_index])
        own = self._embed(self.projector(pack(tokens)), index)
        masked = self._masked(pack(position)).to(own.dtype)
        of_each = zip(unpack(own, shown), unpack(masked, asked), strict=True)
        whole = [torch.cat(both, dim=1) for both in of_each]
        packed = Packed(tuple(Sequences(*part.shape[:2]) for part in whole))
        stream = Residual(pack(whole))
        for block in self.blocks[:-1]:
            stream = block(stream, packed=packed)
        # The own tokens are not used after the last block.
        pairs = zip(packed.groups, asked, strict=True)
        last = tuple(group._replace(num_last=of.length) for group, of in pairs)
        stream = self.blocks[-1](stream, packed=Packed(last))
        return tuple(unpack(self.head(self.norm(stream.total())), asked))

    def _embed(self, tokens: Tensor, token_index: Tensor) -> Tensor:  # [..., C], [...] -> [..., D]
        return self.embed(tokens) + F.embedding(token_index, self.own_position)

    def _masked(self, position: Tensor) -> Tensor:  # [..., 4] -> [..., D]
        """Return mask tokens that carry their positions."""
        place, log_size = position.split(2, dim=-1)
        place = torch.cat([place, LOG_SIZE_SCALE * log_size], -1)
        place = sincos_embedding(place, self.cfg.dim, self.frequencies)
        return self.position(place) + self.mask_token


class GlobalHead(nn.Module):
    """A head that embeds an image: the mean over its own tokens, then a two-layer MLP.

    hidden_dim 0: one linear layer without bias in the place of the MLP.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.hidden = Linear(input_dim, hidden_dim) if hidden_dim else None
        self.output = Linear(hidden_dim or input_dim, output_dim, bias=hidden_dim > 0)

    def reset_parameters(self) -> None:
        """Initialise every parameter, as after `to_empty`."""
        reset_children(self)

    def forward(self, tokens: Tensor) -> Tensor:  # [I, n, C] -> [I, output_dim]
        return self.of_means(tokens.mean(dim=1))

    def of_means(self, mean: Tensor) -> Tensor:  # [I, C] -> [I, output_dim]
        """Embed images by the means over their own tokens."""
        return self.output(mean if self.hidden is None else F.gelu(self.hidden(mean)))


class Mlp(nn.Sequential):
    """An MLP with batch norm and ReLU, or GELU alone, after each linear layer but the last.

    dims: widths of input, hidden layers and output. output_norm: put a batch norm without affine
    after the last layer.
    """

    def __init__(
        self,
        *dims: int,
        batch_norm: bool,
        output_norm: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        layers: list[nn.Module] = []
        for dim_in, dim_out in zip(dims[:-2], dims[1:-1], strict=True):
            layers.append(Linear(dim_in, dim_out, bias=not batch_norm))
            if batch_norm:
                layers.append(BatchNorm(dim_out, process_group=process_group))
            layers.append(nn.ReLU() if batch_norm else nn.GELU())
        layers.append(Linear(dims[-2], dims[-1], bias=not output_norm))
        if output_norm:
            layers.append(BatchNorm(dims[-1], affine=False, process_group=process_group))
        super().__init__(*layers)

    def reset_parameters(self) -> None:
        """Initialise every parameter and running statistic, as after `to_empty`."""
        reset_children(self)


class PrototypeHead(nn.Module):
    """A head whose cosines with K prototypes are logits, after an MLP without batch norm.

    As DINO, arXiv 2104.14294, with its weight norm kept at one, and MSN, arXiv 2204.07141.
    """

    def __init__(self, input_dim: int, cfg: ProjectorConfig, num_prototypes: int) -> None:
        super().__init__()
        hidden = [cfg.hidden_dim] * (cfg.num_layers - 1)
        self.mlp = Mlp(input_dim, *hidden, cfg.output_dim, batch_norm=False)
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, cfg.output_dim))
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise every parameter, as after `to_empty`."""
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.prototypes)

    def forward(self, features: Tensor) -> Tensor:  # [N, C] -> [N, E] fp32
        """Return rows of unit length, whose products with `directions` are logits."""
        return unit_rows(wide(self.mlp(features)))

    def directions(self) -> Tensor:  # [K, E] fp32
        """Return the prototypes as rows of unit length."""
        return unit_rows(wide(self.prototypes))
