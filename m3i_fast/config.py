"""The root config of a run: it composes the components' configs and checks what spans them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import cattrs
import tyro
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

from m3i_fast.config_fields import COUNTS, NUMBERS, ROWS, STEPS, THREADS, WIDTHS, check_fields
from m3i_fast.engine.guard.config import GuardConfig
from m3i_fast.engine.optim.ema import EmaConfig
from m3i_fast.engine.optim.optimizers import OptimConfig
from m3i_fast.engine.parallel.config import ParallelConfig
from m3i_fast.json_files import read_json
from m3i_fast.models.internimage.config import InternImageConfig
from m3i_fast.models.transformer.text import TextConfig
from m3i_fast.models.transformer.vit import ViTConfig
from m3i_fast.models.vision import VisionConfig
from m3i_fast.objectives.config import LABELS, ObjectiveConfig, Term
from m3i_fast.observe.config import TelemetryConfig
from m3i_fast.pipelines.config import LoaderConfig
from m3i_fast.storage import write_atomically

Precision = Literal[
    "auto", "fp32", "bf16", "fp8_current", "fp8_delayed", "fp8_block", "mxfp8"
]  # fmt: skip
Backend = Literal["auto", "torch", "te", "torchao"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All that decides the result of a run: equal configs give equal runs."""

    seed: Annotated[int, NUMBERS] = 0
    """Seed of initialisation, masks, pairs and dropout; the loader has its own, data.seed."""
    num_steps: Annotated[int, STEPS] = 100_000
    """Optimiser steps. Schedules are arrays of this length."""
    num_classes: Annotated[int, ROWS] = 1000
    """Categories in the data; 0 if it has none."""
    data: LoaderConfig = field(default_factory=LoaderConfig)
    vision: Annotated[VisionConfig, tyro.conf.AvoidSubcommands] = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    precision: Precision = "auto"
    """Of matrix products; auto: bf16 on a GPU from sm_80 up, fp32 elsewhere. FP8 has one scale a
    tensor, of now (current) or of the past (delayed), one a block of 128, or one of 32 values (mx);
    all that is not FP8 is then bf16."""
    backend: Backend = "auto"
    """Library of the blocks; auto: torch, and for FP8 Transformer Engine or else torchao."""
    fp8_min_dim: Annotated[int, WIDTHS] = 768
    """FP8 only where a linear layer has as many features in and out; narrower ones stay in bf16."""
    compile: bool = False
    """torch.compile the encoders and the decoder."""
    cuda_graphs: bool = False
    """Replay each ViT, text encoder and decoder as one launch, forward and backward, by a graph for
    each shape: for kernels that are shorter than their launches, as those of ViT-S and B. On a GPU,
    alone or with DDP; every graph keeps its activations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the first GPU if there is one."""
    deterministic: bool = False
    """Only operations that give the same bits at every run on the same machine, though slower ones;
    what has none is refused."""
    num_threads: Annotated[int, range(THREADS.stop)] = 0
    """CPU threads of torch; 0 leaves torch's default."""
    log_every: Annotated[int, COUNTS] = 10
    """Steps between two reads of the metrics, the only host synchronisation."""
    checkpoint_every: Annotated[int, COUNTS] = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: Annotated[int, COUNTS] = 2
    """Newest checkpoints kept."""
    keep_every: Annotated[int, NUMBERS] = 0
    """Steps between checkpoints that are kept for ever; 0 keeps none of them."""
    keep_best: str = ""
    """Logged metric whose best checkpoint is kept as well: loss/total its lowest,
    +monitor/target_rank its highest; as it was when last logged before the save."""
    async_checkpoint: bool = True
    """Write checkpoints in a thread, from a copy in host memory; the step waits for the copy."""

    def __post_init__(self) -> None:
        check_fields(self)
        views = self.data.global_views
        if views.size != self.vision.image_size:
            raise ValueError(
                f"data.global_views.size: expected vision.image_size = {self.vision.image_size}, "
                f"got {views.size}"
            )
        if self.objective.uses(view="other") and views.count < 2:
            raise ValueError(
                f"data.global_views.count: a term of the other view needs 2 views, got "
                f"{views.count}"
            )
        local = self.data.local_views
        if local is not None and local.size % self.vision.size_multiple:
            raise ValueError(
                f"data.local_views.size: expected a multiple of the encoder's "
                f"{self.vision.size_multiple}, got {local.size}"
            )
        self.objective.mixing.check_batch(self.data.batch_size)
        if local is not None and self.objective.mixing.mode == "blend":
            raise ValueError(
                "data.local_views: expected none with objective.mixing.mode = blend, which weighs "
                f"images by their share, got {local.count} of {local.size} pixels"
            )
        self.objective.check_vision(self.vision)
        self._check_projector()
        if self.parallel.shard != 1:
            self._check_spread()
        if self.cuda_graphs:
            self._check_graphs()

    def _check_projector(self) -> None:
        """Batch norm in the decoder's projector needs all rows of a step in one call."""
        if self.objective.decoder.projector != "batch_norm":
            return
        for name, is_off, got in (
            ("parallel.chunk", not self.parallel.chunk, self.parallel.chunk),
            ("compile", not self.compile, self.compile),
            ("cuda_graphs", not self.cuda_graphs, self.cuda_graphs),
        ):
            if not is_off:
                raise ValueError(
                    f"objective.decoder.projector: expected none or mlp with {name} = {got}, got "
                    "batch_norm, whose statistics are of all rows of a step"
                )

    def _check_spread(self) -> None:
        """What needs whole weights on every rank is refused."""
        whole = "with parallel.shard = 1 alone, which"
        if self.optim.matrices == "muon":
            raise ValueError(
                f"optim.matrices: expected adamw, or muon {whole} takes a whole matrix at a time; "
                f"got muon and shard = {self.parallel.shard}"
            )
        if self.objective.balance.mode == "gradient_norm":
            raise ValueError(
                "objective.balance.mode: expected fixed or uncertainty, or gradient_norm "
                f"{whole} goes back through the predictors in the forward pass; got gradient_norm "
                f"and shard = {self.parallel.shard}"
            )

    def _check_graphs(self) -> None:
        """What a graph cannot hold, or would give wrong gradients, is refused."""
        vision, text = self.vision, self.text
        wanted = {
            "vision": (isinstance(vision, ViTConfig), "a ViT", type(vision).__name__),
            "precision": (
                self.precision in ("auto", "fp32", "bf16"),
                "auto, fp32 or bf16",
                self.precision,
            ),
            "compile": (not self.compile, "False", self.compile),
            "parallel.shard": (self.parallel.shard == 1, "1", self.parallel.shard),
            "parallel.chunk": (not self.parallel.chunk, "0", self.parallel.chunk),
            "parallel.accumulate": (self.parallel.accumulate == 1, "1", self.parallel.accumulate),
            "objective.balance.mode": (
                self.objective.balance.mode != "gradient_norm",
                "fixed or uncertainty",
                self.objective.balance.mode,
            ),
            "vision.drop_path_mode": (
                getattr(vision, "drop_path_mode", "mask") == "mask",
                "mask",
                getattr(vision, "drop_path_mode", "mask"),
            ),
            "activation_checkpointing": (
                {vision.activation_checkpointing, text.activation_checkpointing} == {"none"},
                "none of vision and text",
                f"{vision.activation_checkpointing} and {text.activation_checkpointing}",
            ),
        }
        for name, (is_right, expected, got) in wanted.items():
            if not is_right:
                raise ValueError(f"{name}: expected {expected} with cuda_graphs, got {got}")

    def to_json(self) -> str:
        return json.dumps(_converter.unstructure(self), indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write as JSON, beside and renamed."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a config.json; ValueError names the file and the unknown or wrong field."""
        try:
            return cls.from_tree(read_json(path), path)
        except FileNotFoundError:
            raise FileNotFoundError(f"--config: no such file: {path}") from None

    @classmethod
    def from_tree(cls, tree: dict[str, Any], path: Path) -> TrainConfig:
        """Take what `to_json` wrote; ValueError names the file and the unknown or wrong field."""
        try:
            return _converter.structure(tree, cls)
        except (cattrs.BaseValidationError, ValueError, TypeError) as error:
            reasons = (
                cattrs.transform_error(error, path="config", format_exception=_reason)
                if isinstance(error, cattrs.BaseValidationError)
                else [str(error)]
            )
            raise ValueError(f"{path}: " + "; ".join(reasons)) from None


def differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Fields in which two configs differ, as "path: a != b"."""
    return _differences("", _converter.unstructure(a), _converter.unstructure(b))


def _differences(path: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [
            line
            for key in keys
            for line in _differences(f"{path}.{key}" if path else key, a.get(key), b.get(key))
        ]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


_converter = cattrs.Converter(forbid_extra_keys=True)


def _vision_config(value: dict[str, Any], _: Any) -> VisionConfig:
    """Told by a field that only one of them has, and no config lacks.

    activation_checkpointing was a bool until there was a third way.
    """
    name = "activation_checkpointing"
    if isinstance(value.get(name), bool):
        value = value | {name: "full" if value[name] else "none"}
    if "channels" in value:
        return _converter.structure(value, InternImageConfig)
    return _converter.structure(value, ViTConfig)


def _term(value: dict[str, Any], _: Any) -> Term:
    """One that says no mean is of before there were two: over the members, as it was then."""
    if isinstance(value, dict) and value.get("target") in LABELS:
        value = {"mean": "members"} | value
    return _structure_term(value, Term)


def _reason(error: BaseException, kind: type | None) -> str:
    """The text of what a config raises; cattrs's own for what is missing, unknown or no object."""
    if isinstance(error, (KeyError, TypeError, AttributeError, cattrs.ForbiddenExtraKeysError)):
        return format_exception(error, kind)
    return str(error)


def _only(kind: type, expected: str, *others: type) -> Callable[[Any, Any], Any]:
    """Take values of this type (cattrs would make 3 of 3.7, and True of "false")."""

    def structure(value: Any, _: Any) -> Any:
        if type(value) not in (kind, *others):
            raise ValueError(f"expected {expected}, got {value!r}")
        return kind(value)

    return structure


_converter.register_structure_hook(bool, _only(bool, "true or false"))
_converter.register_structure_hook(int, _only(int, "a whole number"))
_converter.register_structure_hook(float, _only(float, "a number", int))
_converter.register_structure_hook(str, _only(str, "text"))
_converter.register_structure_hook(VisionConfig, _vision_config)
_structure_term = make_dict_structure_fn(Term, _converter)
_converter.register_structure_hook(Term, _term)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))
