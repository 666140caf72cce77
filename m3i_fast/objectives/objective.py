"""The objective: a sum of terms, each a lower bound of the mutual information with a target.

Legend: B samples, I images in inputs (K times P inputs), V views that the encoder encodes, n cells
an image shows, m cells of a local view, N cells of the grid, C encoder width, E embedding width, R
target images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.fields import refuse
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.models.encoder import ImageEncoder, take_cells
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.layers import reset_children
from m3i_fast.models.transformer.ragged import Cells, mapped
from m3i_fast.models.transformer.vit import Masking, ViT
from m3i_fast.objectives.balance import Balance
from m3i_fast.objectives.heads import DenseDecoder, PackedQuestion, Question
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.monitors import target_monitors
from m3i_fast.objectives.phi_s import PhiStandardise
from m3i_fast.objectives.step_context import (
    WHOLE,
    BatchWeight,
    Encoded,
    Rows,
    Source,
    Stage,
    StepContext,
    Targets,
    no_stage,
    target_rows,
)
from m3i_fast.objectives.targets import (
    MomentumEncoder,
    autocast_dtype,
    blend,
    normalise_tokens,
    normalise_views,
)
from m3i_fast.objectives.term_gradients import TermGradients, separate_views
from m3i_fast.objectives.terms import (
    Annotation,
    Caption,
    Dense,
    Label,
    Sizes,
    TermModule,
    build_term,
    copy_state,
    dense_dim,
    momentum_copy,
)
from m3i_fast.ops import mask_mix

if TYPE_CHECKING:
    from m3i_fast.pipelines.batch import Batch

T = TypeVar("T", bound=TermModule)


class MutualInformation(nn.Module):
    """The loss sum_k weight_k * -log P_k(z_k | z_hat_k), paper section 3, and its networks.

    An image takes part in the terms whose targets it has. teachers: the frozen encoders in use, by
    `Term.target_encoder`; they are not part of the state dict. process_group: the ranks that share
    a batch; a loss over all pairs of rows (`likelihoods`) is that of all ranks' rows, and every
    rank runs every term, also where none of its rows has the target. layers: constructors of all
    Transformer blocks' modules.

    Raises ValueError where the config does not fit the encoder, or a teacher is missing.
    """

    def __init__(
        self,
        cfg: ObjectiveConfig,
        *,
        vision: VisionConfig,
        text: TextConfig,
        num_classes: int,
        columns: tuple[ColumnConfig, ...] = (),
        teachers: Mapping[str, ImageEncoder] = MappingProxyType({}),
        process_group: dist.ProcessGroup | None = None,
        layers: BlockLayers = TORCH_LAYERS,
    ) -> None:
        super().__init__()
        refuse(cfg.vision_conflicts(vision))
        self.cfg, self.grid = cfg, vision.grid
        self.encoder = build_encoder(vision, layers=layers)
        self._target_rows = target_rows(cfg.active_terms)
        self._num_views = cfg.num_encoded_views
        self.mask_token = (
            nn.Parameter(torch.zeros(vision.dim)) if cfg.mixing.encodes_hidden else None
        )
        if cfg.uses(encoder="momentum"):
            self.target_encoder = MomentumEncoder(self.encoder)
        if cfg.uses(encoder="snapshot"):
            self.snapshot = MomentumEncoder(self.encoder)
        self.teachers = {name: _expect_teacher(teachers, name) for name in cfg.teachers}
        """The frozen encoders, outside the module tree, its state dict and its training mode."""
        sizes = self._sizes(vision, text, num_classes)
        sizes = replace(sizes, columns=columns, process_group=process_group, layers=layers)
        self.terms = nn.ModuleDict({t.name: build_term(t, cfg, sizes) for t in cfg.active_terms})
        decoders = {
            term.decoder_key: _build_decoder(term.term, cfg, sizes)
            for term in self.terms_of(Dense)
            if term.decoder_key is not None
        }
        self.decoders = nn.ModuleDict(decoders)
        self.target_projectors = nn.ModuleDict(
            {
                key: momentum_copy(decoder.projector, sizes)
                for key, decoder in decoders.items()
                if decoder.cfg.projector != "none"
            }
        )
        weights = {t.name: t.weight for t in cfg.active_terms}
        self.balance = Balance(cfg.balance, weights, process_group)
        self._term_gradients: TermGradients | None = None

    def reset_parameters(self) -> None:
        """Initialise everything after `to_empty`, with the values of a direct build."""
        pairs = dict(self._shared_copies())
        averages = self.average_encoders()
        reset_children(self, but=[*averages, self.decoders, self.target_projectors])
        self._reset_decoders()
        if self.mask_token is not None:
            nn.init.zeros_(self.mask_token)
        for average, online in pairs.items():
            copy_state(average, online)

    def _reset_decoders(self) -> None:
        """Draw each decoder's weights once a term, as the constructor, which keeps the last."""
        keys = [term.decoder_key for term in self.terms_of(Dense) if term.decoder_key is not None]
        for place, key in enumerate(keys, start=1):
            decoder = self.decoders[key]
            assert isinstance(decoder, DenseDecoder)
            if key not in keys[place:]:
                decoder.reset_parameters()
                continue
            with decoder.mask_token.device:
                DenseDecoder(
                    decoder.cfg,
                    input_dim=self.encoder.dim,
                    output_dim=decoder.head.out_features,
                    input_grid=decoder.input_grid,
                )

    def _sizes(self, vision: VisionConfig, text: TextConfig, num_classes: int) -> Sizes:
        target_dim = dict.fromkeys(("momentum", "snapshot"), vision.dim)
        summary_dim = dict.fromkeys(("momentum", "snapshot"), vision.summary_dim)
        for name, teacher in self.teachers.items():
            target_dim[name], summary_dim[name] = teacher.dim, teacher.summary_dim
        return Sizes(
            vision=vision,
            text=text,
            num_classes=num_classes,
            target_dim=target_dim,
            summary_dim=summary_dim,
        )

    def _every_term(self) -> list[TermModule]:
        return [term for term in self.terms.values() if isinstance(term, TermModule)]

    def _labels(self) -> list[Label]:
        return [term for term in self.terms.values() if isinstance(term, Label)]

    def terms_of(self, kind: type[T]) -> list[T]:
        """Return the active terms of one class."""
        return [term for term in self.terms.values() if isinstance(term, kind)]

    @torch.no_grad()
    def finish_step(self) -> None:
        """Clamp every learnt 1 / tau, update the targets' running statistics and count reversals.

        To be called once after the optimiser's step, on every rank.
        """
        for label in self._labels():
            label.clamp_temperature()
        for term in self._every_term():
            if isinstance(term, Annotation) and term.reversal is not None:
                term.reversal.advance()
        for dense in self.terms_of(Dense):
            if dense.standardise is not None:
                dense.standardise.fold()

    @torch.no_grad()
    def renew_bases(self, step: int) -> None:
        """Let the bases of PHI-S follow their statistics, where the step of this index is one to.

        To be called before each step, on every rank, and outside of a captured graph: it waits for
        the device after 1, 2, 4, 8 steps and so on, up to `phi_s_steps`, which end the collecting.
        """
        last = self.cfg.phi_s_steps
        for dense in self.terms_of(Dense):
            of_term = dense.standardise
            if not isinstance(of_term, PhiStandardise) or of_term.known is not None:
                continue
            of_term.collects = step < last
            if step == last or (0 < step < last and step.bit_count() == 1):
                of_term.renew()

    def copies(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield (copy, online) of each module that begins as a copy of another and is not trained.

        They are those that follow by EMA, and the snapshot.
        """
        yield from self._shared_copies()
        for term in self._every_term():
            yield from term.momentum_pairs()

    def _shared_copies(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield from self._shared_momentum_pairs()
        if self.cfg.uses(encoder="snapshot"):
            yield self.snapshot.encoder, self.encoder

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield (average, online) of each module that follows another by EMA."""
        yield from self._shared_momentum_pairs()
        for term in self._every_term():
            yield from term.momentum_pairs()

    def _shared_momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield the pairs that belong to no single term."""
        if self.cfg.uses(encoder="momentum"):
            yield self.target_encoder.encoder, self.encoder
        for key, average in self.target_projectors.items():
            decoder = self.decoders[key]
            assert isinstance(decoder, DenseDecoder)
            yield average, decoder.projector

    def average_encoders(self) -> list[MomentumEncoder]:
        """Return the encoders of targets that are averages of the trained one: EMA and snapshot."""
        return [child for child in self.children() if isinstance(child, MomentumEncoder)]

    @torch.no_grad()
    def encode_targets(self, batch: Batch, mix: Mix) -> Targets:
        """Encode all target views that a term uses, in one call of each target encoder.

        What the batch has of a frozen encoder is taken from there.
        """
        tokens: dict[Source, Tensor] = {}
        for name, encoder in self._target_encoders().items():
            sources = [source for source in self._target_rows if source[0] == name]
            if name in batch.features:
                for source in sources:
                    asked = _take(mix, mix.sample, self._target_rows[source])
                    tokens[source] = batch.features[name][asked]
                continue
            images = [
                normalise_views(
                    batch.global_views[view],
                    _take(mix, mix.sample, self._target_rows[name, view]),
                    autocast_dtype(mix.sample.device.type),
                )
                for _, view in sources
            ]
            if images:
                by_view = encoder(torch.cat(images)).split([len(view) for view in images])
                tokens |= dict(zip(sources, by_view, strict=True))
        return Targets(tokens, self._target_rows)

    def _target_encoders(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the functions [R, 3, H, W] -> [R, N, C] of the target encoders in use, by name."""
        encoders: dict[str, Callable[[Tensor], Tensor]] = {}
        if self.cfg.uses(encoder="momentum"):
            encoders["momentum"] = self.target_encoder
        if self.cfg.uses(encoder="snapshot"):
            encoders["snapshot"] = self.snapshot
        return encoders | {name: each.encode_cells for name, each in self.teachers.items()}

    def encode_inputs(self, batch: Batch, mix: Mix) -> Encoded:
        """Encode the inputs, of both views where a term uses them, and the local views."""
        views = batch.global_views[: self._num_views]
        images = torch.cat([_mixed(view, mix) for view in views])
        index = self._stacked(mix)
        mode = self.cfg.mixing.mode
        shown = index if self.cfg.mixing.encodes_alone else None
        own, local = self._encode_views(images, shown, batch, mix)
        if mode == "joint":
            own = take_cells(own, index)
        elif mode == "blend":  # both images of an input share its tokens
            own = own.repeat(2, 1, 1)
        by_view = own.unflatten(0, (-1, self._num_views, mix.num_inputs)).unbind(1)
        return Encoded(tuple(view.flatten(0, 1) for view in by_view), local)

    def _encode_views(
        self,
        images: Tensor,  # [V P, 3, H, W]
        shown: Tensor | None,  # [K V P, n] int64, cells of images that are encoded alone
        batch: Batch,
        mix: Mix,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # [K V P, n, C] or [V P, N, C], [B, m, C] each
        """Encode inputs and local views, by a ViT with all products of both together."""
        encoder, priority = self.encoder, mix.branch_priority
        masking = self._masking(mix)
        if not batch.local_views:
            return self._encode_inputs(images, shown, priority, masking), ()
        local = torch.cat(batch.local_views)
        if isinstance(encoder, ViT) and priority is None:
            every = torch.arange(len(local), device=local.device)
            pictures = normalise_views(local, every, autocast_dtype(local.device.type))
            own, of_local = encoder.encode_views(images, shown, pictures, masking)
        else:
            own = self._encode_inputs(images, shown, priority, masking)
            of_local = self._encode_whole(local, mix.local_branch_priority)
        return own, of_local.split(len(batch.local_views[0]))

    def _encode_inputs(
        self,
        images: Tensor,
        shown: Tensor | None,
        priority: Tensor | None,
        masking: Masking | None,
    ) -> Tensor:
        if shown is None and masking is None:
            return self.encoder.encode_cells(images, priority)
        assert isinstance(self.encoder, ViT)  # vision_conflicts
        if shown is None:
            return self.encoder.encode_cells(images, priority, masking)
        return self.encoder.encode_alone(images, shown, priority)

    def _masking(self, mix: Mix) -> Masking | None:
        """Return the cells of inputs, of all views, that are mask tokens for the encoder."""
        if self.mask_token is None:
            return None
        index = self._stacked(mix)
        hidden = torch.ones(len(index), self.grid**2, dtype=torch.bool, device=index.device)
        return Masking(hidden.scatter_(1, index, False), self.mask_token)

    def _stacked(self, mix: Mix) -> Tensor:  # [K V P, n]
        """Repeat the cells of images for all views, so that image i is in input i % (V P)."""
        if self._num_views == 1:
            return mix.token_index
        by_image = mix.token_index.unflatten(0, (mix.members.shape[1], 1, -1))
        return by_image.expand(-1, self._num_views, -1, -1).flatten(0, 2)

    def _encode_whole(
        self,
        views: Tensor,  # [B, 3, s, s] uint8
        priority: Tensor | None = None,  # [B, 2 L] int32
    ) -> Tensor:  # [B, m, C]
        every = torch.arange(views.shape[0], device=views.device)
        images = normalise_views(views, every, autocast_dtype(views.device.type))
        return self.encoder.encode_cells(images, priority)

    def forward(
        self,
        encoded: Encoded,
        targets: Targets,
        batch: Batch,
        mix: Mix,
        *,
        monitor: bool = False,
        measure: bool = False,
        stage: Stage = no_stage,
        weight: BatchWeight = WHOLE,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, [], and metrics by name, all on the device.

        The metrics are each term's unweighted loss and number of members, and with `monitor` its
        weight and the collapse monitors. measure: update the balance of weights. stage: times each
        term as `loss.NAME` and their sum as `loss.total`. weight: of the batch in its step, a
        factor of each loss, the logged one too.
        """
        step = StepContext(batch, mix, encoded, targets, self.encoders(), stage, weight)
        read_by = self._separate_views(encoded) if monitor else {}
        metrics: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}

        def log(name: str, value: Tensor) -> None:
            metrics[f"monitor/{name}"] = value.detach()

        steps = {name: step.with_encoded(read_by[name]) if read_by else step for name in self.terms}
        answers = self._answers(steps)
        for term in self._every_term():
            name = term.term.name
            monitored = log if monitor else None
            with stage(f"loss.{name}"):
                value, members = term(steps[name], monitored, **answers.get(name, {}))
                losses[name] = term.weigh(value, step)
            metrics[f"loss/{name}"] = losses[name].detach()
            if isinstance(members, int):
                members = losses[name].new_full((), members)
            metrics[f"members/{name}"] = members.float()
        with stage("loss.total"):
            if measure:
                self.balance.measure(losses, encoded.tensors, self._shares(metrics, step))
            total, weights = self.balance(losses)
            metrics["loss/total"] = total.detach()
            if monitor:
                metrics |= {f"weight/{name}": weight for name, weight in weights.items()}
                metrics |= self._monitor(step)
        if read_by:  # after `measure`, whose backward passes must not be counted
            self._term_gradients = TermGradients(read_by)
        return total, metrics

    def _shares(self, metrics: Mapping[str, Tensor], step: StepContext) -> dict[str, Tensor]:
        """Return the share of this rank's rows with a target, for terms that average over all."""
        return {
            term.term.name: step.weight.own_rows
            * metrics[f"members/{term.term.name}"].double()
            / term.num_rows(step)
            for term in self._every_term()
            if isinstance(term, Annotation) and term.term.mean == "batch"
        }

    def _separate_views(self, encoded: Encoded) -> dict[str, Encoded]:
        """Return the tokens of each term to measure its gradient by; empty without gradients."""
        if not encoded.tensors[0].requires_grad:
            return {}
        return {term.term.name: separate_views(encoded) for term in self._every_term()}

    def gradient_metrics(self) -> dict[str, Tensor]:
        """Return norms and cosines of the terms' gradients by the encoder (`TermGradients`).

        To be called once after the backward pass of a forward pass with `monitor`; empty otherwise,
        and where the encoder takes no gradient.
        """
        gradients, self._term_gradients = self._term_gradients, None
        return gradients.metrics() if gradients is not None else {}

    def _answers(self, steps: Mapping[str, StepContext]) -> dict[str, dict[str, Any]]:
        """Return the arguments asked, answers and project of terms that have a decoder, by name.

        Each decoder answers all its terms at once; its time is that of the first one.
        """
        arguments: dict[str, dict[str, Any]] = {}
        for key, decoder in self.decoders.items():
            assert isinstance(decoder, DenseDecoder)
            terms = {t.term.name: t for t in self.terms_of(Dense) if t.decoder_key == key}
            first = next(iter(terms))
            with steps[first].stage(f"loss.{first}"):
                asked = {name: term.ask(steps[name]) for name, term in terms.items()}
                answers = iter(_answers(decoder, [q for a in asked.values() for q in a.questions]))
            for name, of in asked.items():
                arguments[name] = {"asked": of, "answers": [next(answers) for _ in of.questions]}
                if key in self.target_projectors:
                    arguments[name]["project"] = self.target_projectors[key]
        return arguments

    def encoders(self) -> dict[str, ImageEncoder]:
        """Return the encoders in use: online, and those of targets by `Term.target_encoder`."""
        encoders: dict[str, ImageEncoder] = {"online": self.encoder}
        if self.cfg.uses(encoder="momentum"):
            encoders["momentum"] = self.target_encoder.encoder
        if self.cfg.uses(encoder="snapshot"):
            encoders["snapshot"] = self.snapshot.encoder
        return encoders | self.teachers

    @torch.no_grad()
    def embed_images(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode whole images, [B, 3, S, S] uint8: tokens [B, N, C], unit embeddings [B, E].

        The embeddings are in the space of `embed_captions`; None without a caption term.
        """
        tokens = self._encode_whole(views)
        for term in self.terms_of(Caption):
            return tokens, term.embed(self.encoder.summarise(tokens))
        return tokens, None

    @torch.no_grad()
    def embed_captions(self, token_ids: Tensor, num_tokens: Tensor) -> Tensor:
        """Embed captions as unit vectors: [B, T] int, [B] int64 -> [B, E].

        Raises ValueError without a caption term.
        """
        for term in self.terms_of(Caption):
            return term.embed_captions(token_ids, num_tokens)
        raise ValueError(
            "objective.terms: expected a caption term of weight > 0 to embed captions, got none; "
            "train with one, or evaluate without captions"
        )

    @torch.no_grad()
    def _monitor(self, step: StepContext) -> dict[str, Tensor]:
        metrics = {
            f"monitor/{term.term.name}_log_scale": term.log_scale.detach().exp()
            for term in self._labels()
        }
        views = step.encoded.views
        for (encoder, view), rows in self._target_rows.items():
            if encoder == "momentum" and view == int(self.cfg.uses(view="other")):
                student = mapped(normalise_tokens, _take_cells(step.mix, views[0], rows))
                target = mapped(normalise_tokens, step.target_tokens(encoder, view, rows))
                return metrics | target_monitors(target, student)
        student = mapped(normalise_tokens, views[0])
        if len(views) > 1:
            return metrics | target_monitors(mapped(normalise_tokens, views[1]), student)
        return metrics | target_monitors(student)


def _build_decoder(term: Term, cfg: ObjectiveConfig, sizes: Sizes) -> DenseDecoder:
    """Build the decoder that terms with this kind of target share."""
    decoder = cfg.decoder if cfg.projects(term) else replace(cfg.decoder, projector="none")
    return DenseDecoder(
        decoder,
        input_dim=sizes.vision.dim,
        output_dim=dense_dim(term, cfg, sizes),
        input_grid=sizes.vision.grid,
        layers=sizes.layers,
        process_group=sizes.process_group,
    )


def _answers(
    decoder: DenseDecoder, questions: Sequence[Question | PackedQuestion]
) -> Sequence[Cells]:
    """Answer a decoder's questions, all of squares or all of views of any shape."""
    packed = [question for question in questions if isinstance(question, PackedQuestion)]
    if packed:
        return decoder.answer_packed(packed)
    return decoder.answer([question for question in questions if isinstance(question, Question)])


def _expect_teacher(teachers: Mapping[str, ImageEncoder], name: str) -> ImageEncoder:
    if name not in teachers:
        raise ValueError(
            "objective.teacher: expected a run directory, timm:NAME or timm:NAME:FILE for the "
            f"terms whose encoder is frozen, got none for {name}"
        )
    return teachers[name]


def _mixed(views: Tensor, mix: Mix) -> Tensor:  # [B, 3, H, W] uint8 -> [P, 3, H, W]
    dtype = autocast_dtype(views.device.type)
    if mix.share is not None:
        return blend(views, mix.members, mix.share, dtype)
    return mask_mix(views, mix.choice, mix.members, dtype=dtype)


def _take_cells(mix: Mix, cells: Cells, rows: Rows) -> Cells:  # [I, n, C] -> [R, n, C]
    return cells if rows == "every" else mix.take_cells(cells, rows)


def _take(mix: Mix, values: Tensor, rows: Rows) -> Tensor:  # [I, ...] -> [R, ...]
    return values if rows == "every" else mix.take(values, rows)
