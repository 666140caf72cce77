"""What a run keeps of its data, data.json: all that its model is used by once they are gone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m3i_fast.config import TrainConfig
from m3i_fast.config.columns import ColumnKind
from m3i_fast.config.convert import from_tree, to_tree
from m3i_fast.config.data import ViewConfig
from m3i_fast.durable_files import write_atomically
from m3i_fast.engine.run.data_fields import num_captioned, used_splits
from m3i_fast.json_files import read_json
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.opened.mixture import MixedData

DATA_FILE = "data.json"

Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What a whole picture becomes before the encoder, as evaluation makes it.

    Its largest centred square is resized with antialiasing, rounded to uint8 and normalised.
    """

    size: int
    """Side in pixels of what the encoder reads."""
    interpolation: Literal["cubic", "linear"]
    """Filter of the resize."""
    mean: Channels
    """Mean that is subtracted from each channel, of values in 0..1."""
    std: Channels
    """Deviation that each channel is then divided by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRecord:
    """A data set that a run was trained on."""

    name: str
    split: str
    digest: str
    """SHA-256 of its manifest, and by that of every byte of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnRecord:
    """A named column that the data of a run had."""

    name: str
    kind: ColumnKind
    names: tuple[str, ...]
    """Of its classes, labels or numbers, in the order of a head's outputs; of a text none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataRecord:
    """Everything that a model's inputs and outputs depend on beside its weights and config."""

    version: Literal[1] = 1
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    """Names of the categories, in the order of their labels."""
    tokenizer: TokenizerInfo
    """What the tokenizer of the captions is built again from."""
    datasets: tuple[DatasetRecord, ...]
    """The data set, or all that were mixed."""
    columns: tuple[ColumnRecord, ...] = ()
    num_captioned: int | None = None
    """Pictures with a caption; None: an older version began the run."""

    def save(self, run: Path) -> None:
        """Write data.json into a run directory, atomically."""
        write_atomically(run / DATA_FILE, (json.dumps(to_tree(self), indent=2) + "\n").encode())


def record_data(cfg: TrainConfig, described: Manifest | MixedData) -> DataRecord:
    """Return what a run of `cfg` keeps of the data that are described."""
    return DataRecord(
        preprocessing=preprocessing_of(cfg),
        class_names=described.class_names,
        tokenizer=described.tokenizer,
        datasets=tuple(
            DatasetRecord(name=manifest.name, split=split, digest=manifest.digest)
            for manifest, split in used_splits(cfg, described)
        ),
        columns=tuple(
            ColumnRecord(name=column.name, kind=column.kind, names=column.names)
            for column in described.columns
        ),
        num_captioned=num_captioned(cfg, described),
    )


def preprocessing_of(cfg: TrainConfig) -> Preprocessing:
    """Return how evaluation prepares pictures for the encoder of a config."""
    whole = ViewConfig(count=1, size=cfg.vision.image_size)  # as evaluation_batches has it
    return Preprocessing(
        size=whole.size, interpolation=whole.interpolation, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )


def read_record(run: Path) -> DataRecord | None:
    """Read data.json of a run directory; None where an older version began the run.

    Raises ValueError, which names the file and every unknown or wrong field, or pixels that this
    version normalises by other numbers.
    """
    path = run / DATA_FILE
    try:
        tree = read_json(path, {"class_names": [str]})  # of which a tuple would be made of "cat"
    except FileNotFoundError:
        return None
    record = from_tree(DataRecord, tree, str(path))
    made = record.preprocessing
    if (made.mean, made.std) != (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            f"{path}: expected pixels of mean {IMAGENET_MEAN} and deviation {IMAGENET_STD}, as "
            f"they are normalised here, got {made.mean} and {made.std}; use the version of "
            "m3i-fast that trained the run, which its env.json names"
        )
    return record
