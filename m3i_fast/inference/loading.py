"""Loads the model of a run for use: the encoder and the heads of annotations, no more of it.

Decoders, prototypes, teachers and moments are neither built nor read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.targets import ANSWERS
from m3i_fast.config.run_encoder import PREFIXES, Which, expect_run, expect_which
from m3i_fast.engine.checkpoint.checkpoints import Checkpoint, latest
from m3i_fast.engine.checkpoint.shard_files import Shards
from m3i_fast.engine.precision.arithmetic import compute_dtype, resolve_device
from m3i_fast.engine.run.data_record import (
    DATA_FILE,
    DataRecord,
    preprocessing_of,
    read_record,
    record_data,
)
from m3i_fast.export.weight_files import WEIGHTS
from m3i_fast.inference.model import Model
from m3i_fast.inference.transform import Transform
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.models.transformer.layers import reset
from m3i_fast.objectives.terms import (
    Caption,
    Category,
    Labels,
    Numbers,
    Sizes,
    TermModule,
    build_term,
)
from m3i_fast.pipelines.opened.mixture import MixedData, read_described

if TYPE_CHECKING:
    from m3i_fast.pipelines.dataset.manifest import Manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """What is read of a run: its weights, and where the rest of it lies."""

    weights: Shards
    directory: Path
    """Of config.json, and of data.json where the run has one."""
    digest_of_data: str | None = None
    """As the checkpoint's position in the data has it; None: of an export."""
    step: int | None = None
    """Number of optimiser steps of the checkpoint; None: of an export."""


def load(
    run: str | os.PathLike[str],
    *,
    which: Which = "trained",
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    data: str | os.PathLike[str] | None = None,
) -> Model:
    """Load the model of a run, of its newest good checkpoint, in evaluation mode and frozen.

    Every byte of the checkpoint is verified; nothing is unpickled, and the data of the run are not
    read.

    Args:
        run: run directory, one of its checkpoints, such as runs/demo/checkpoints/step_00000100, or
            a folder that `m3i-fast export RUN OUT --to safetensors` wrote.
        which: trained: the encoder that was trained, with its heads; ema: its moving average, which
            has no heads.
        device: a device of torch; auto: the first GPU if there is one, else the CPU.
        dtype: of matrix products, float32, or bfloat16 by autocast; weights and embeddings are fp32
            either way. None: that of the run, as evaluation has it.
        data: the data set of a run that an older version began, which kept no record of it
            (`data.json`) in its directory; classes and tokenizer are read there. Where there is a
            record the data are compared with it.

    Raises:
        FileNotFoundError: there is no such run or checkpoint, or no data set in `data`.
        ValueError: no checkpoint is good, the run has no moving average, `data` is not the data set
            of the run, or an argument is none of those above.
    """
    stored = find_weights(Path(run))
    directory = stored.directory
    cfg = TrainConfig.load(directory / "config.json")
    _expect_choices(directory, cfg, which, dtype)
    target = resolve_device("auto") if device == "auto" else torch.device(device)
    record = read_record(directory)
    if data is not None:
        record = data_record(stored, cfg, Path(data))
    preprocessing = preprocessing_of(cfg) if record is None else record.preprocessing

    with _default_dtype(torch.float32):
        with torch.device("meta"):
            encoder = build_encoder(cfg.vision)
            terms = _answering_terms(cfg) if which == "trained" else {}
        parts = {f"terms.{name}.": term for name, term in terms.items()}
        with torch.device("cpu"):
            _read(stored.weights, {PREFIXES[which]: encoder, **parts})
    captions = [term for term in terms.values() if isinstance(term, Caption)]
    others = [term for term in terms.values() if isinstance(term, Category | Labels | Numbers)]
    categories = [term for term in others if isinstance(term, Category) and not term.term.column]
    model = Model(
        encoder=encoder,
        caption=captions[0] if captions else None,
        category=categories[0] if categories else None,
        columns=[term for term in others if term.term.column],
        transform=Transform(preprocessing),
        compute_dtype=dtype or compute_dtype(cfg.precision, target),
        without_heads=_without_heads(directory, which, record),
        read_record=partial(_same, record) if record else partial(_from_data, stored, cfg),
    )
    return model.to(target).requires_grad_(False).eval()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let modules be built in the dtype of their weights, whatever torch.set_default_dtype says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def has_average(run: str | os.PathLike[str]) -> bool:
    """Return whether a run directory is of a run that keeps a moving average of its encoder."""
    config = Path(run) / "config.json"
    is_run = config.is_file() and (Path(run) / "checkpoints").is_dir()
    return is_run and TrainConfig.load(config).objective.uses(encoder="momentum")


def find_weights(path: Path) -> Stored:
    """Return the weights of a run, checkpoint or export.

    Of a checkpoint every byte is verified. A run's checkpoints go before a file of weights that was
    written beside them. Raises FileNotFoundError and ValueError as `load`.
    """
    if (path / "config.json").is_file():
        if not (path / "checkpoints").is_dir() and (path / WEIGHTS).is_file():
            return Stored(Shards([path / WEIGHTS], path), path)
        return _of_checkpoint(latest(path / "checkpoints"), path)
    run = path.absolute().parent.parent
    if not path.is_dir() or not (run / "config.json").is_file():
        expect_run(path, other=", or a checkpoint in it")
    checkpoint = Checkpoint(path)
    checkpoint.verify()
    return _of_checkpoint(checkpoint, run)


def _of_checkpoint(checkpoint: Checkpoint, run: Path) -> Stored:
    position = checkpoint.state(rank=0).get("loader", {})
    return Stored(checkpoint.shards("model"), run, position.get("dataset"), checkpoint.step)


def _expect_choices(run: Path, cfg: TrainConfig, which: str, dtype: torch.dtype | None) -> None:
    expect_which(which)
    if which == "ema" and not cfg.objective.uses(encoder="momentum"):
        raise ValueError(
            f"which: expected trained, since {run} trained no term on a moving average, got ema"
        )
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or None, got {dtype}")


def _answering_terms(cfg: TrainConfig) -> dict[str, TermModule]:
    """Build the terms whose heads answer for a picture by themselves, by name."""
    sizes = Sizes(
        vision=cfg.vision,
        text=cfg.text,
        num_classes=cfg.num_classes,
        columns=cfg.columns,
        target_dim={},
        summary_dim={},
    )
    return {
        term.name: build_term(term, cfg.objective, sizes)
        for term in cfg.objective.active_terms
        if term.target in ANSWERS
    }


@torch.no_grad()
def _read(stored: Shards, modules: Mapping[str, nn.Module]) -> None:
    """Give modules on the meta device memory and their weights, by the prefix of their names."""
    for module in modules.values():
        module.to_empty(device="cpu")
        if {name for name, _ in module.named_buffers()} - module.state_dict().keys():
            reset(module)  # sets what is computed and not stored
    weights = {
        f"{prefix}{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }
    if missing := sorted(weights.keys() - stored.sizes.keys()):
        raise ValueError(
            f"{stored.path}: expected the weights that config.json asks for, got none of "
            f"{', '.join(missing[:5])}{', ...' * (len(missing) > 5)}"
        )
    stored.read_into(weights)


def _without_heads(run: Path, which: str, record: DataRecord | None) -> str:
    if which == "ema":
        return "the moving average has none, and those that were trained go with which='trained'"
    has_none = record is not None and record.num_captioned == 0
    return f"{run} trained no such term{', and its data had no captions' if has_none else ''}"


def _same(record: DataRecord) -> DataRecord:
    return record


def data_record(stored: Stored, cfg: TrainConfig, data: Path | None = None) -> DataRecord:
    """Return the record of a run, or where it has none, that of its data.

    data: where these lie now; None: where cfg has them. Raises ValueError where there is no record
    and the data are not there, and where those that are named are not the run's.
    """
    record = read_record(stored.directory)
    if record is not None and data is None:
        return record
    if data is not None:
        cfg = replace(cfg, data=replace(cfg.data, path=data, mixture=()))
    if record is None:
        return _from_data(stored, cfg) if data is None else _described(stored, cfg)
    _expect_as_recorded(stored.directory / DATA_FILE, record, read_described(cfg.data), cfg)
    return record


def _from_data(stored: Stored, cfg: TrainConfig) -> DataRecord:
    """Return the record of a run that has none, from the data that its config names."""
    try:
        return _described(stored, cfg)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{stored.directory}: an older version began the run and left no {DATA_FILE} with its "
            f"classes and tokenizer, and they cannot be read from its data: {error}; name the data "
            "set that it was trained on: load(..., data=DIR), m3i-fast export --data DIR"
        ) from error


def _described(stored: Stored, cfg: TrainConfig) -> DataRecord:
    """Return what a run keeps of its data; ValueError where these are other data than its own."""
    described = read_described(cfg.data)
    tokenizer = described.tokenizer
    got = len(described.class_names), tokenizer.vocab_size, tokenizer.context_length
    expected = cfg.num_classes, cfg.text.vocab_size, cfg.text.context_length
    if got != expected:
        raise ValueError(
            f"data: expected the data set of the run, (classes, token ids, tokens a caption) = "
            f"{expected}, got {got} in {_places(cfg)}"
        )
    if stored.digest_of_data is None:
        logger.warning(
            "%s does not say which data it was trained on: that %s are the same is not checked "
            "beyond the numbers of classes and tokens",
            stored.directory,
            _places(cfg),
        )
    elif described.digest != stored.digest_of_data:
        raise ValueError(
            f"data: expected the data set of the run, of digest {stored.digest_of_data}, as its "
            f"checkpoint has it, got {described.digest} in {_places(cfg)}"
        )
    return record_data(cfg, described)


def _expect_as_recorded(
    file: Path, record: DataRecord, got: Manifest | MixedData, cfg: TrainConfig
) -> None:
    """Raise ValueError for data of other classes or another tokenizer than a run's record."""
    wrong = []
    if got.tokenizer != record.tokenizer:
        wrong.append(f"tokenizer: expected {record.tokenizer}, got {got.tokenizer}")
    pairs = enumerate(zip_longest(record.class_names, got.class_names))
    wrong += [f"class {n}: expected {a!r}, got {b!r}" for n, (a, b) in pairs if a != b][:1]
    if wrong:
        raise ValueError(
            f"data: expected those of {file}, got others in {_places(cfg)}: {'; '.join(wrong)}; "
            "leave them out, as the run needs none"
        )


def _places(cfg: TrainConfig) -> str:
    return " and ".join(str(part.path) for part in cfg.data.mixture_parts) or str(cfg.data.path)
