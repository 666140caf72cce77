"""The objective: a sum of terms, each a lower bound of the mutual information with a target.

Legend: B samples, V views, P mixed inputs, I images in inputs (2 P, or P without mixing), A inputs
that dense terms are asked of, n cells an image shows, m cells of a local view, N cells of the grid,
Q cells predicted, C encoder width, E embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.models.encoder import take_cells
from m3i_fast.models.positions import relative_positions
from m3i_fast.models.text import TextConfig, TextEncoder
from m3i_fast.models.vision import VisionConfig, build_encoder
from m3i_fast.models.vit import ViT
from m3i_fast.objectives.methods import Term, m3i
from m3i_fast.objectives.mixing import Mix, MixingConfig, drop_tokens
from m3i_fast.objectives.monitors import mean_cosine, target_monitors
from m3i_fast.objectives.predictors import (
    DecoderConfig,
    DenseDecoder,
    GlobalHead,
)
from m3i_fast.objectives.targets import MomentumEncoder, normalise_tokens, normalise_views
from m3i_fast.ops import IGNORED, boltzmann, gaussian, mask_mix

if TYPE_CHECKING:
    from m3i_fast.pipelines.batch import Batch

MAX_SCALE = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    terms: tuple[Term, ...] = field(default_factory=m3i)
    """The terms of the sum; M3I's four by default."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    head_hidden_dim: int = 2048
    """Width of the hidden layer of the category and caption heads."""
    sigma: float = 0.5**0.5
    """Standard deviation of the Gaussian likelihood; sqrt(1/2) gives SiameseIM's mean squared
    error."""
    decorrelation_weight: float = 0.02
    """Weight of the decorrelation regulariser, SiameseIM's value."""
    temperature: float = 0.07
    """Initial temperature of the Boltzmann likelihoods; learnt, and kept from 0.01 up."""

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if len(set(names)) != len(names):
            raise ValueError(f"objective.terms: expected distinct names, got {names}")
        if not any(term.weight > 0 for term in self.terms):
            raise ValueError("objective.terms: expected a weight > 0, got none")
        if not 1 / MAX_SCALE <= self.temperature:
            raise ValueError(
                f"objective.temperature: expected >= {1 / MAX_SCALE}, got {self.temperature}"
            )

    @property
    def active_terms(self) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.weight > 0)

    def uses(self, target: str) -> bool:
        return any(term.target == target for term in self.active_terms)

    def check_vision(self, vision: VisionConfig) -> None:
        """Raise ValueError unless this encoder can be trained with this mixing."""
        vision.check_encoder()
        self.mixing.check_grid(vision.grid)
        self.mixing.check_cells(alone=vision.encodes_cells_alone, multiple=vision.mask_multiple)


@dataclass(frozen=True, slots=True)
class DenseTargets:
    """What the EMA encoder says of the cells that are asked for; None where no term asks.

    Not yet normalised: the likelihood does that on its way.
    """

    same_view: Tensor | None  # [A, Q, C]
    other_view: Tensor | None  # [A, Q, C]
    tokens: Tensor | None  # [A, N, C], for the monitors


@dataclass(frozen=True, slots=True)
class Encoded:
    tokens: Tensor  # [I, n, C], each image's own cells
    local: tuple[Tensor, ...] = ()  # L x [B, m, C], whole local views


class MutualInformation(nn.Module):
    """loss = sum_k weight_k * -log P_k(z_k | z_hat_k), paper section 3.

    Every image is asked only what exists for it.
    """

    def __init__(
        self, cfg: ObjectiveConfig, *, vision: VisionConfig, text: TextConfig, num_classes: int
    ) -> None:
        super().__init__()
        cfg.check_vision(vision)
        self.cfg = cfg
        self.grid = vision.grid
        self.encoder = build_encoder(vision)
        if any(term.is_dense for term in cfg.active_terms):
            self.target_encoder = MomentumEncoder(self.encoder)
            self.decoder = DenseDecoder(
                cfg.decoder, input_dim=vision.dim, output_dim=vision.dim, input_grid=vision.grid
            )
        if cfg.uses("category"):
            if num_classes < 1:
                raise ValueError(
                    "objective.terms: the category term needs classes, the data has none"
                )
            self.category_head = GlobalHead(vision.summary_dim, cfg.head_hidden_dim, text.embed_dim)
            self.category_embedding = nn.Parameter(torch.empty(num_classes, text.embed_dim))
            self.category_log_scale = nn.Parameter(torch.empty(()))
        if cfg.uses("caption"):
            self.caption_head = GlobalHead(vision.summary_dim, cfg.head_hidden_dim, text.embed_dim)
            self.text_encoder = TextEncoder(text)
            self.caption_log_scale = nn.Parameter(torch.empty(()))
        self.reset_own_parameters()

    @torch.no_grad()
    def reset_own_parameters(self) -> None:
        """Initialise what belongs to no submodule: class embeddings and temperatures."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("log_scale"):
                parameter.fill_(-math.log(self.cfg.temperature))
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    @torch.no_grad()
    def clamp_temperatures(self) -> None:
        """Keep every 1 / tau in [1, 100], in place, after the optimiser's step (open_clip)."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("log_scale"):
                parameter.clamp_(0.0, math.log(MAX_SCALE))

    def momentum_pair(self) -> tuple[nn.Module, nn.Module] | None:
        """The EMA encoder and the encoder it follows; None when no term has dense targets."""
        if not any(term.is_dense for term in self.cfg.active_terms):
            return None
        return self.target_encoder.encoder, self.encoder

    @torch.no_grad()
    def encode_targets(self, batch: Batch, mix: Mix) -> DenseTargets:
        """EMA features of the first images' own view and of the last images' other view."""
        same_view = other_view = tokens = None
        if self.cfg.uses("same_view"):
            tokens = self._target_tokens(batch.global_views[0], mix.sample[mix.same_view_rows])
            same_view = _take(tokens, mix.same_view_query)
        if self.cfg.uses("other_view"):
            tokens = self._target_tokens(batch.global_views[1], mix.sample[mix.other_view_rows])
            other_view = _take(tokens, mix.other_view_query)
        return DenseTargets(same_view, other_view, tokens)

    def encode_inputs(self, batch: Batch, mix: Mix) -> Encoded:
        """One pass of the encoder over the mixed inputs; tokens come back sorted by image."""
        views = batch.global_views[0]
        images = mask_mix(views, mix.mask, mix.pairs, dtype=_autocast_dtype(views.device.type))
        match self.cfg.mixing.mode:
            case "own_image":
                assert isinstance(self.encoder, ViT)  # check_vision
                own = self.encoder.encode_alone(images, mix.token_index)
            case "joint":
                own = take_cells(self.encoder.encode_cells(images), mix.token_index)
            case "none":
                own = self.encoder.encode_cells(images)
        return Encoded(own, tuple(self._encode_whole(view) for view in batch.local_views))

    def _encode_whole(self, views: Tensor) -> Tensor:  # [B, 3, s, s] uint8 -> [B, m, C]
        every = torch.arange(views.shape[0], device=views.device)
        images = normalise_views(views, every, _autocast_dtype(views.device.type))
        return self.encoder.encode_cells(images)

    def forward(
        self,
        encoded: Encoded,
        targets: DenseTargets,
        batch: Batch,
        mix: Mix,
        *,
        monitor: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and every term unweighted; all on the device.

        With `monitor` also the collapse monitors.
        """
        total = torch.zeros((), device=encoded.tokens.device)
        metrics: dict[str, Tensor] = {}
        summaries: list[Tensor] = []
        if not all(term.is_dense for term in self.cfg.active_terms):
            summaries = [self.encoder.summarise(t) for t in (encoded.tokens, *encoded.local)]
        for term in self.cfg.active_terms:
            if term.is_dense:
                value = self._dense(
                    term, encoded, targets, batch, mix, metrics if monitor else None
                )
            elif term.target == "category":
                value = self._category(summaries, batch, mix)
            else:
                value = self._caption(summaries, batch, mix)
            metrics[f"loss/{term.name}"] = value.detach()
            total = total + term.weight * value
        metrics["loss/total"] = total.detach()
        if monitor:
            metrics |= self._monitor(encoded, targets, mix)
        return total, metrics

    @torch.no_grad()
    def embed_images(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 3, S, S] uint8 whole images -> patch tokens [B, N, C], unit embeddings [B, E].

        Captions are matched with the embeddings; None without a caption term.
        """
        tokens = self._encode_whole(views)
        if not self.cfg.uses("caption"):
            return tokens, None
        embedding = self.caption_head(self.encoder.summarise(tokens))
        return tokens, F.normalize(embedding.float(), dim=-1)

    @torch.no_grad()
    def embed_captions(self, token_ids: Tensor, num_tokens: Tensor) -> Tensor:
        """[B, T] int, [B] int64 -> unit caption embeddings [B, E].

        Raises ValueError without a caption term.
        """
        if not self.cfg.uses("caption"):
            raise ValueError(
                "objective.terms: expected a caption term of weight > 0 to embed captions, got none"
            )
        return F.normalize(self.text_encoder(token_ids, num_tokens).float(), dim=-1)

    def _dense(
        self,
        term: Term,
        encoded: Encoded,
        targets: DenseTargets,
        batch: Batch,
        mix: Mix,
        metrics: dict[str, Tensor] | None,
    ) -> Tensor:
        same = term.target == "same_view"
        rows = mix.same_view_rows if same else mix.other_view_rows
        query = mix.same_view_query if same else mix.other_view_query
        target = targets.same_view if same else targets.other_view
        assert target is not None
        boxes = batch.boxes[mix.sample[rows]]  # [A, V, 5]
        position = relative_positions(
            boxes[:, 0],
            boxes[:, 0 if same else 1],
            query,
            input_grid=self.grid,
            target_grid=self.grid,
        )
        z_hat = self.decoder(encoded.tokens[rows], mix.token_index[rows], position)
        if metrics is not None:
            metrics[f"monitor/{term.name}_cosine"] = mean_cosine(
                z_hat.detach(), normalise_tokens(target)
            )
        value = self._dense_nll(term, z_hat, target)
        if same or not encoded.local:
            return value
        return (value + self._dense_local(term, encoded, target, batch, mix)) / (
            1 + len(encoded.local)
        )

    def _dense_local(
        self, term: Term, encoded: Encoded, target: Tensor, batch: Batch, mix: Mix
    ) -> Tensor:
        """Local views of the asked images predict the same cells of the other view; summed."""
        samples = mix.sample[mix.other_view_rows]
        total = torch.zeros((), device=target.device)
        for number, tokens in enumerate(encoded.local, start=len(batch.global_views)):
            local_grid = math.isqrt(tokens.shape[1])
            boxes = batch.boxes[samples]
            position = relative_positions(
                boxes[:, number],
                boxes[:, 1],
                mix.other_view_query,
                input_grid=local_grid,
                target_grid=self.grid,
            )
            # Cell (u, v) of a smaller grid has the position code of cell (u, v) of the large one.
            line = torch.arange(local_grid, device=target.device)
            index = (line[:, None] * self.grid + line[None, :]).flatten().expand(len(samples), -1)
            z_hat = self.decoder(tokens[samples], index, position)
            total = total + self._dense_nll(term, z_hat, target)
        return total

    def _dense_nll(self, term: Term, z_hat: Tensor, target: Tensor) -> Tensor:
        decorrelates = term.regulariser == "decorrelation"
        return gaussian(
            z_hat,
            target,
            sigma=self.cfg.sigma,
            normalise=True,
            decorrelation_weight=self.cfg.decorrelation_weight if decorrelates else 0.0,
        )

    def _category(self, summaries: list[Tensor], batch: Batch, mix: Mix) -> Tensor:
        z_hat = _unit_rows(self.category_head, summaries)
        z = F.normalize(self.category_embedding, dim=-1)
        targets = _of_rows(batch.label, summaries, mix)
        return boltzmann(z_hat, z, self.category_log_scale.exp(), targets=targets)

    def _caption(self, summaries: list[Tensor], batch: Batch, mix: Mix) -> Tensor:
        z_hat = _unit_rows(self.caption_head, summaries)
        token_ids, num_tokens = drop_tokens(
            batch.token_ids, batch.num_tokens, mix.token_priority, self.cfg.mixing.token_dropout
        )
        z = F.normalize(self.text_encoder(token_ids, num_tokens).float(), dim=-1)
        ids = batch.group_id.masked_fill(batch.num_tokens == 0, IGNORED)
        row_ids = _of_rows(ids, summaries, mix)
        return boltzmann(z_hat, z, self.caption_log_scale.exp(), row_ids=row_ids, col_ids=ids)

    def _target_tokens(self, views: Tensor, rows: Tensor) -> Tensor:  # [A, N, C]
        return self.target_encoder(normalise_views(views, rows, _autocast_dtype(views.device.type)))

    @torch.no_grad()
    def _monitor(self, encoded: Encoded, targets: DenseTargets, mix: Mix) -> dict[str, Tensor]:
        metrics = {
            f"monitor/{name}": parameter.detach().exp()
            for name, parameter in self.named_parameters(recurse=False)
            if name.endswith("log_scale")
        }
        if targets.tokens is not None:
            rows = mix.other_view_rows if self.cfg.uses("other_view") else mix.same_view_rows
            student = normalise_tokens(encoded.tokens[rows])
            metrics |= target_monitors(normalise_tokens(targets.tokens), student)
        return metrics


def _unit_rows(head: GlobalHead, summaries: list[Tensor]) -> Tensor:  # [I + L B, E] fp32
    """Unit-length predictions of every image in an input, then of every local view."""
    rows = torch.cat([head(tokens) for tokens in summaries])
    return F.normalize(rows.float(), dim=-1)


def _of_rows(values: Tensor, summaries: list[Tensor], mix: Mix) -> Tensor:  # [B] -> [I + L B]
    return torch.cat([values[mix.sample], *(values for _ in summaries[1:])])


def _take(tokens: Tensor, index: Tensor) -> Tensor:  # [R, N, C], [R, Q] -> [R, Q, C]
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _autocast_dtype(device_type: str) -> torch.dtype:
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32
