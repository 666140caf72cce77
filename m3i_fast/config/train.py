"""The root config of a run: it composes the components' configs and checks what spans them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from m3i_fast.config.any_shape import any_shape_conflicts
from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.convert import from_tree, to_tree
from m3i_fast.config.data import LoaderConfig
from m3i_fast.config.fields import (
    COUNTS,
    NUMBERS,
    ROWS,
    STEPS,
    THREADS,
    WIDTHS,
    Checked,
    Conflict,
)
from m3i_fast.config.guard import GuardConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.config.run_encoder import NamedEncoder
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.durable_files import write_atomically
from m3i_fast.json_files import read_json

Precision = Literal[
    "auto", "fp32", "bf16", "fp8_current", "fp8_delayed", "fp8_block", "mxfp8"
]  # fmt: skip
Backend = Literal["auto", "torch", "te", "torchao"]
Graphs = Literal["none", "modules", "step"]
INIT_SCHEMES = {
    **{"timm": "FILE_OR_FOLDER", "dinov2": "FILE", "dinov3": "FILE", "open_clip": "FILE_OR_FOLDER"},
    **{"hf": "FOLDER", "internimage": "FILE", "run": "DIR[,which=ema]"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Checked):
    """Hold all that decides the result of a run: equal configs give equal runs."""

    seed: Annotated[int, NUMBERS] = 0
    """Seed of initialisation, masks, pairs and dropout; the loader has its own, data.seed."""
    init: str = ""
    """Weights that the image encoder begins from, SCHEME:PATH. timm:FILE_OR_FOLDER, a
    VisionTransformer of timm's, or Eva of DINOv3; dinov2:FILE, dinov3:FILE, those repositories';
    open_clip:FILE_OR_FOLDER, a model of open_clip, also for the text encoder where text.attention
    is causal; hf:FOLDER, a folder of Hugging Face's transformers; internimage:FILE, a published
    InternImage; run:DIR, the newest checkpoint of a run, run:DIR,which=ema its moving average.
    Files are .safetensors or torch.save's. Empty: none."""
    num_steps: Annotated[int, STEPS] = 100_000
    """Number of optimiser steps, which is the length of the schedules."""
    num_classes: Annotated[int, ROWS] = 1000
    """Categories in the data, 0 for none. Training takes it from the data's manifest."""
    columns: Annotated[tuple[ColumnConfig, ...], tyro.conf.Fixed] = ()
    """Named columns of the data. Training takes them from the data's manifest."""
    data: LoaderConfig = field(default_factory=LoaderConfig)
    vision: VisionConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    precision: Precision = "auto"
    """Precision of matrix products; auto: bf16 on a GPU from sm_80 up, fp32 elsewhere. FP8 has one
    scale per tensor, from this step (current) or earlier ones (delayed), one per block of 128
    (block), or one per 32 values (mx); all that is not FP8 is then bf16."""
    backend: Backend = "auto"
    """Library of the blocks; auto: torch, and for FP8 Transformer Engine or else torchao."""
    fp8_min_dim: Annotated[int, WIDTHS] = 768
    """Least features in and out of a linear layer that runs in FP8; narrower ones stay in bf16."""
    compile: bool = False
    """Compile the encoders and the decoder by torch.compile."""
    cuda_graphs: Graphs = "none"
    """Replay work as CUDA graphs, for kernels that are shorter than their launches, as those of
    ViT-S and B. step: forward and backward pass, clipping, guard, optimiser and EMA in one launch,
    on one GPU; steps with monitors are launched kernel by kernel, in memory of their own. modules:
    each ViT, text encoder and decoder, forward and backward, with a graph for each shape, also
    under DDP; every graph keeps its activations, and views of two sizes and the questions to a
    decoder are calls by themselves, which round otherwise than packed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that trains; auto: the first GPU if there is one, else the CPU."""
    deterministic: bool = False
    """Use only operations that give the same bits at every run on the same machine, though slower
    ones; a config that needs an operation without such a form is refused."""
    num_threads: Annotated[int, range(THREADS.stop)] = 0
    """CPU threads of torch; 0 leaves torch's default."""
    log_every: Annotated[int, COUNTS] = 10
    """Steps between two reads of the metrics, the only host synchronisation."""
    checkpoint_every: Annotated[int, COUNTS] = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: Annotated[int, COUNTS] = 2
    """Number of the newest checkpoints that are kept."""
    keep_every: Annotated[int, NUMBERS] = 0
    """Steps between checkpoints that are kept for ever; 0 keeps none of them."""
    keep_best: str = ""
    """Logged metric whose best checkpoint is kept as well: loss/total its lowest,
    +monitor/target_rank or +evaluate/knn_top1 its highest; as it was when last logged before the
    save."""
    evaluate_every: Annotated[int, NUMBERS] = 0
    """Steps between two evaluations of the live model: kNN, its classifier, classes by prompts and
    retrieval of captions, whose values are logged as evaluate/knn_top1 and so on; the last step is
    one, too. 0: none. Training is the same to the bit with them and without, and a resume may have
    other evaluate_ fields."""
    evaluate_split: str = "heldout"
    """Split that is evaluated; its neighbours are looked for in data.split."""
    evaluate_data: Path | None = None
    """Data set of these splits; none: data.path. A mixture needs it."""
    evaluate_pictures: Annotated[int, range(1, 10**6 + 1)] = 5000
    """Most pictures of each of the two splits: at even steps over them, or the first ones of a
    bucket. They are dealt to the ranks."""
    async_checkpoint: bool = True
    """Write checkpoints in a thread, from a copy in host memory; the step waits for the copy."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._view_conflicts()
        if not self.data.any_shape:  # a budget holds whole inputs
            yield from self.objective.mixing.batch_conflicts(self.data.batch_size)
        yield from self.objective.vision_conflicts(self.vision)
        yield from any_shape_conflicts(self)
        yield from self._projector_conflicts()
        if self.init:
            yield from self._init_conflicts()
        if self.objective.teacher_cache is not None:
            yield from self._teacher_cache_conflicts()
        yield from self._evaluate_conflicts()
        if self.optim.freeze_encoder:
            yield from self._frozen_conflicts()
        if self.parallel.shard != 1:
            yield from self._shard_conflicts()
        if self.cuda_graphs == "modules":
            yield from self._module_graph_conflicts()
        if self.cuda_graphs == "step":
            yield from self._step_graph_conflicts()

    def _view_conflicts(self) -> Iterator[Conflict]:
        """Yield views that are not of the encoder's size, or that a term misses."""
        views, local = self.data.global_views, self.data.local_views
        if views.size != self.vision.image_size:
            yield (
                "data.global_views.size",
                f"expected vision.image_size = {self.vision.image_size}, got {views.size}",
            )
        if self.objective.uses(view="other") and views.count < 2:
            yield (
                "data.global_views.count",
                f"expected 2 or more with a term of the other view, got {views.count}",
            )
        if local is None:
            return
        if local.size % self.vision.size_multiple:
            yield (
                "data.local_views.size",
                f"expected a multiple of the encoder's {self.vision.size_multiple}, got "
                f"{local.size}",
            )
        if self.objective.mixing.mode == "blend":
            yield (
                "data.local_views",
                "expected none with objective.mixing.mode = blend, which weighs images by their "
                f"share, got {local.count} of {local.size} pixels",
            )

    def _init_conflicts(self) -> Iterator[Conflict]:
        """Yield a source of weights that is not known, or that the encoder cannot have."""
        scheme, _, place = self.init.partition(":")
        if scheme not in INIT_SCHEMES or not place:
            known = [f"{name}:{kind}" for name, kind in INIT_SCHEMES.items()]
            yield "init", f"expected one of {', '.join(known)}, got {self.init!r}"
            return
        if scheme == "run":
            try:
                NamedEncoder.of(place)
            except ValueError as error:
                yield "init", str(error)
        elif (scheme == "internimage") == isinstance(self.vision, ViTConfig):
            is_vit = isinstance(self.vision, ViTConfig)
            takes = (
                "a file of a ViT with a ViT" if is_vit else "internimage:FILE with an InternImage"
            )
            yield "init", f"expected run:DIR or {takes}, got {self.init!r}"

    def _teacher_cache_conflicts(self) -> Iterator[Conflict]:
        """Yield what keeps a teacher's features of a picture from being the same at each step."""
        if self.data.augment:
            yield (
                "data.augment",
                "expected False with objective.teacher_cache, which holds one view of each "
                "picture, got True: set --data.no-augment, or --objective.teacher-cache None",
            )
        if self.data.mixture:
            yield (
                "data.mixture",
                "expected none with objective.teacher_cache, which is of one data set, got "
                f"{len(self.data.mixture)}",
            )
        if not self.objective.uses(encoder="frozen"):
            yield (
                "objective.teacher_cache",
                "expected none without a term whose encoder is frozen, got "
                f"{self.objective.teacher_cache}",
            )

    def _evaluate_conflicts(self) -> Iterator[Conflict]:
        """Yield an evaluation without one data set, and a best checkpoint by one that is off."""
        if not self.evaluate_every and self.keep_best.removeprefix("+").startswith("evaluate/"):
            yield (
                "evaluate_every",
                f"expected at least 1 with keep_best = {self.keep_best}, got 0",
            )
        if self.evaluate_every and self.evaluate_split == self.data.split:
            yield (
                "evaluate_split",
                f"expected another split than data.split, where neighbours are looked for, got "
                f"{self.evaluate_split}",
            )
        if self.evaluate_every and self.data.mixture and self.evaluate_data is None:
            yield (
                "evaluate_data",
                "expected a data set to evaluate on, since the run trains on a mixture, got none",
            )

    def _frozen_conflicts(self) -> Iterator[Conflict]:
        """Yield what needs a gradient of the encoder's outputs, or changes what it computes."""
        if self.objective.balance.mode == "gradient_norm":
            yield (
                "objective.balance.mode",
                "expected fixed or uncertainty with optim.freeze_encoder, whose outputs have no "
                "gradient to measure, got gradient_norm",
            )
        if self.vision.drop_path_rate:
            yield (
                "vision.drop_path_rate",
                "expected 0 with optim.freeze_encoder, whose features are those of all its layers, "
                f"got {self.vision.drop_path_rate}",
            )

    def _projector_conflicts(self) -> Iterator[Conflict]:
        """Yield what splits the rows of a step, which a projector with batch norm needs whole."""
        if self.objective.decoder.projector != "batch_norm":
            return
        settings = {
            "parallel.chunk": self.parallel.chunk,
            "compile": self.compile,
            "cuda_graphs": self.cuda_graphs if self.cuda_graphs == "modules" else "",
        }
        for name, got in settings.items():
            if got:
                yield (
                    "objective.decoder.projector",
                    f"expected none or mlp with {name} = {got}, got batch_norm, whose statistics "
                    "are of all rows of a step",
                )

    def _shard_conflicts(self) -> Iterator[Conflict]:
        """Yield what needs whole weights on every rank."""
        whole = "with parallel.shard = 1 alone, which"
        if self.optim.matrices == "muon":
            yield (
                "optim.matrices",
                f"expected adamw, or muon {whole} takes a whole matrix at a time; got muon and "
                f"shard = {self.parallel.shard}",
            )
        if self.objective.balance.mode == "gradient_norm":
            yield (
                "objective.balance.mode",
                f"expected fixed or uncertainty, or gradient_norm {whole} goes back through the "
                f"predictors in the forward pass; got gradient_norm and shard = "
                f"{self.parallel.shard}",
            )

    def _module_graph_conflicts(self) -> Iterator[Conflict]:
        """Yield what a module's graph cannot hold, or would give wrong gradients for."""
        vision, balance = self.vision, self.objective.balance
        wanted = self._of_any_graph() | {
            "vision": (isinstance(vision, ViTConfig), "a ViT", type(vision).__name__),
            "parallel.accumulate": (self.parallel.accumulate == 1, "1", self.parallel.accumulate),
            "objective.balance.mode": (
                balance.mode != "gradient_norm",
                "fixed or uncertainty",
                balance.mode,
            ),
            "vision.drop_path_mode": (
                vision.drop_path_mode == "mask",
                "mask",
                vision.drop_path_mode,
            ),
        }
        yield from self._unmet_by_graphs(wanted)

    def _step_graph_conflicts(self) -> Iterator[Conflict]:
        """Yield what the graph of a step cannot hold, or what would never be replayed."""
        mixing, balance, optim = self.objective.mixing, self.objective.balance, self.optim
        measures_always = balance.mode == "gradient_norm" and balance.every == 1
        wanted = self._of_any_graph() | {
            "optim.name": (optim.name == "adamw", "adamw", optim.name),
            "objective.terms": (
                not self.objective.uses(standardise="phi_s", statistics=None),
                "a file of statistics for phi_s",
                "none",
            ),
            "optim.impl": (optim.used_impl == "torch", "auto or torch", optim.impl),
            "log_every": (self.log_every > 1, "2 or more, as monitored steps have no graph,", 1),
            "objective.balance.every": (
                not measures_always,
                "2 or more, as measured steps have no graph,",
                balance.every,
            ),
            "objective.mixing.final_mask_ratio": (
                mixing.mode != "masked" or mixing.final_mask_ratio == mixing.mask_ratio,
                f"mask_ratio = {mixing.mask_ratio:g}, for steps of one shape,",
                mixing.final_mask_ratio,
            ),
        }
        yield from self._unmet_by_graphs(wanted)

    def _of_any_graph(self) -> dict[str, tuple[bool, str, object]]:
        """Return (whether it holds, expected, got) by field, of modules and of a step alike."""
        checkpointing = (
            self.vision.activation_checkpointing,
            self.text.activation_checkpointing,
            self.objective.captioner.activation_checkpointing,
        )
        return {
            "precision": (
                self.precision in ("auto", "fp32", "bf16"),
                "auto, fp32 or bf16",
                self.precision,
            ),
            "compile": (not self.compile, "False", self.compile),
            "parallel.shard": (self.parallel.shard == 1, "1", self.parallel.shard),
            "parallel.chunk": (not self.parallel.chunk, "0", self.parallel.chunk),
            "vision.activation_checkpointing": (
                set(checkpointing) == {"none"},
                "none of vision, text and objective.captioner",
                " and ".join(checkpointing),
            ),
        }

    def _unmet_by_graphs(
        self, wanted: Mapping[str, tuple[bool, str, object]]
    ) -> Iterator[Conflict]:
        for name, (holds, expected, got) in wanted.items():
            if not holds:
                yield name, f"expected {expected} with cuda_graphs = {self.cuda_graphs}, got {got}"

    def to_json(self) -> str:
        """Return all fields as JSON, which `load` reads."""
        return json.dumps(to_tree(self), indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the config as JSON to `path`, atomically."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a config.json.

        Raises ValueError, which names the file and every unknown or wrong field, and
        FileNotFoundError.
        """
        try:
            return cls.from_tree(read_json(path), path)
        except FileNotFoundError:
            raise FileNotFoundError(f"--config: no such file: {path}") from None

    @classmethod
    def from_tree(cls, tree: dict[str, Any], path: Path) -> TrainConfig:
        """Return the config of an object that `to_json` wrote.

        Raises ValueError, which names `path` and every unknown or wrong field.
        """
        graphs = tree.get("cuda_graphs")
        if isinstance(graphs, bool):  # configs of before a step could be captured
            tree = {**tree, "cuda_graphs": "modules" if graphs else "none"}
        return from_tree(cls, tree, str(path))
