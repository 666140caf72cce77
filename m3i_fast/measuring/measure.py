"""What a measure is: what it reads, what it returns, and the parts that measures have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_fast.evaluation.feature_rows import Index
from m3i_fast.evaluation.rows.calibration import accuracy_by_class
from m3i_fast.measuring.encoders.encoder import Encoder
from m3i_fast.measuring.features import SplitFeatures
from m3i_fast.measuring.source import Source

CPU_SHARE = 10  # a CPU takes the tenth part of published steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """How long measures that train do so; the defaults are those of the papers but on a CPU."""

    linear_steps: int | None = None
    """None: DINOv2's 12,500 on a GPU, and a tenth of them on a CPU."""
    attentive_epochs: int = 20
    """V-JEPA's for ImageNet."""
    fine_tuning_epochs: int = 50
    """MAE's of ViT-L."""
    segmentation_steps: int | None = None
    """None: DINOv2's 40,000 on a GPU, and a tenth of them on a CPU."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag}: expected 1 or more, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureSettings:
    """What measures are told beside their rows."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    """Of prompts, with {} in the place of a class's name."""
    seed: int = 0
    device: torch.device = torch.device("cpu")
    batch_size: int = 64
    """Pictures of a batch, of those measures that decode them."""
    workers: int = 0
    """Processes that decode pictures; 0: this one."""
    training: TrainingSettings = TrainingSettings()
    segmentation: Path | None = None
    """Folder of pictures and masks, of the measure of that name."""


def steps_on(device: torch.device, asked: int | None, published: int) -> int:
    """Return the steps that are asked for, or the published ones, of which a CPU takes a tenth."""
    return asked or (published // CPU_SHARE if device.type == "cpu" else published)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a measure reads: an encoder, and its features in files."""

    encoder: Encoder
    source: Source
    train: SplitFeatures | None
    """Of labelled rows that classifiers are fitted to."""
    measured: SplitFeatures
    settings: MeasureSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure in 0..1, and item by item what it is the mean of, where it is one."""

    name: str
    value: float
    hits: NDArray[np.float64] | None = None  # [n] in 0..1
    rows: Index | None = None  # [n] the row that each is of
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a measure found."""

    figures: tuple[Figure, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """All that the figures depend on beside features; JSON-able."""
    details: dict[str, Any] = field(default_factory=dict)
    """More of the figures: by class, by bin; JSON-able."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What plots are drawn of, by the name of its .npy file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A row of the table."""

    title: str
    protocol: str
    paper: str
    missing: Callable[[Source], str | None]
    """From the counts alone, why the data cannot be measured so; None: they can."""
    lacking: Callable[[Encoder], str | None] = lambda encoder: None
    """What the encoder lacks to be measured so; None: nothing."""
    needs_train: bool = False
    """Whether it reads features of the training rows."""
    takes: Callable[[MeasureSettings], str] | None = None
    """Of one that takes long, and is measured only where --measures names it: what it does for how
    long, which is told before it starts."""
    measure: Callable[[Inputs], Measured]


# ---- What the data must have ---------------------------------------------------------------------


def no_labels(source: Source) -> str | None:
    """Why labels of the measured split cannot be measured by."""
    if source.measured.num_labelled == 0:
        return f"no labels in {source.measured.name}"
    classes = {*source.measured.classes, *(source.train.classes if source.train else ())}
    if len(classes) < 2:
        return "one class alone: nothing to tell apart"
    return None


def no_fit(source: Source) -> str | None:
    """Why no classifier can be fitted."""
    if (reason := no_labels(source)) is not None:
        return reason
    if source.train is None:
        return "no labelled rows to fit to: name them by --train-split"
    if len(source.train.classes) < 2:
        return f"one class alone in {source.train.name}: nothing to fit"
    return None


def no_choice(source: Source) -> str | None:
    """Why no classifier can be fitted and chosen on other rows."""
    if (reason := no_fit(source)) is not None:
        return reason
    assert source.train is not None
    if len(np.unique(source.train.group[source.train.label >= 0])) < 2:
        return f"labels of one group alone in {source.train.name}: no other to choose on"
    return None


# ---- What the encoder must have ------------------------------------------------------------------


def no_texts(encoder: Encoder) -> str | None:
    """Why texts cannot be embedded."""
    return None if encoder.has_text else f"{encoder.name} has no text tower"


def no_patches(encoder: Encoder) -> str | None:
    """Why there are no tokens of patches."""
    return None if encoder.patch_tokens else f"{encoder.name} has no square grid of patch tokens"


def not_trainable(encoder: Encoder) -> str | None:
    """Why the encoder cannot be fine-tuned."""
    if encoder.trainable is not None:
        return None
    return (
        f"{encoder.name} cannot be fine-tuned; expected a ViT or an InternImage with dense tokens "
        "of ours, or a plain transformer of timm"
    )


# ---- Figures -----------------------------------------------------------------------------------


def fitted(inputs: Inputs) -> SplitFeatures:
    assert inputs.train is not None, "a measure whose data lack labels is not run"
    return inputs.train


def accuracy_figure(name: str, predicted: Index, inputs: Inputs) -> Figure:
    return mean_figure(name, hits_of(predicted, inputs), inputs.measured.labelled)


def hits_of(predicted: Index, inputs: Inputs) -> NDArray[np.float64]:
    """Return 1 for each labelled row that is predicted right, else 0."""
    label = inputs.measured.column("label")[inputs.measured.labelled]
    return (predicted == label).astype(np.float64)


def mean_figure(name: str, hits: NDArray[np.float64], rows: Index) -> Figure:
    return Figure(name=name, value=float(hits.mean()), hits=hits, rows=rows)


def error_figure(name: str, value: Any) -> Figure:
    return Figure(name=name, value=float(value), higher_is_better=False)


def accuracy_of_classes(figure: Figure, inputs: Inputs) -> dict[str, float]:
    """Return the accuracy of each class that has measured rows, by name."""
    names = inputs.settings.class_names
    label = inputs.measured.column("label")[inputs.measured.labelled]
    assert figure.hits is not None
    accuracy = accuracy_by_class(figure.hits, label, len(names))
    return {names[i]: float(accuracy[i]) for i in np.unique(label)}
