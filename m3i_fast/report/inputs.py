"""Inputs of the report. Pictures are uint8 RGB arrays, everything else is plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.observe.metrics import Curves

Picture = npt.NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedPair:
    """One input of a real training step: two pictures, their views, the mask and the mixture."""

    originals: tuple[Picture, Picture]
    view_a: tuple[Picture, Picture]  # 2 x [S, S, 3], the views that are mixed
    view_b: tuple[Picture, Picture]  # 2 x [S, S, 3]
    boxes_a: npt.NDArray[np.float32]  # [2, 5]: y, x, height, width in pixels of the original, flip
    boxes_b: npt.NDArray[np.float32]  # [2, 5]
    mask: npt.NDArray[np.bool_]  # [h, w], True: the cell shows the first picture
    mixed: Picture  # [S, S, 3]
    captions: tuple[str, str]  # "" where there is none
    categories: tuple[str, str]  # "" where there is none

    def __post_init__(self) -> None:
        pictures = {
            f"{name}[{i}]": getattr(self, name)[i]
            for name in ("originals", "view_a", "view_b")
            for i in (0, 1)
        }
        for name, picture in (pictures | {"mixed": self.mixed}).items():
            check_picture(f"MixedPair.{name}", picture)
        for name in ("boxes_a", "boxes_b"):
            if getattr(self, name).shape != (2, 5):
                raise ValueError(
                    f"MixedPair.{name}: expected [2, 5], got {getattr(self, name).shape}"
                )
            for i, original in enumerate(self.originals):
                _check_inside(f"MixedPair.{name}[{i}]", getattr(self, name)[i], original)
        rows, columns = self.mask.shape
        if self.mixed.shape[0] % rows or self.mixed.shape[1] % columns:
            raise ValueError(
                f"MixedPair.mask: expected cells that tile {self.mixed.shape[:2]} pixels, "
                f"got {self.mask.shape}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """The pictures that an encoder retrieves for a caption, the most similar first."""

    pictures: tuple[Picture, ...]
    names: tuple[str, ...]  # their captions
    right: int | None  # index of the right picture; None where it is not among them
    rank: int  # of the right picture in the whole gallery, 0 = first

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.names):
            raise ValueError(
                f"Nearest.names: expected one for each of {len(self.pictures)} pictures, "
                f"got {len(self.names)}"
            )
        inside = self.rank if self.rank < len(self.pictures) else None
        if self.right != inside:
            raise ValueError(
                f"Nearest.right: expected {inside}, as the rank is {self.rank} and "
                f"{len(self.pictures)} pictures are shown, got {self.right}"
            )
        for i, picture in enumerate(self.pictures):
            check_picture(f"Nearest.pictures[{i}]", picture)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalRow:
    """A held-out caption, the picture it belongs to, and what each encoder retrieves for it."""

    caption: str
    picture: Picture
    trained: Nearest
    untrained: Nearest | None = None

    def __post_init__(self) -> None:
        check_picture("RetrievalRow.picture", self.picture)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchPca:
    """A picture and its patch features as colour, by `m3i_fast.evaluation.dense.patch_pca`."""

    name: str
    picture: Picture
    trained: npt.NDArray[np.floating[Any]]  # [h, w, 3] in 0..1
    untrained: npt.NDArray[np.floating[Any]] | None = None  # [h, w, 3] in 0..1

    def __post_init__(self) -> None:
        check_picture("PatchPca.picture", self.picture)
        for name in ("trained", "untrained"):
            value = getattr(self, name)
            if value is None:
                continue
            inside = (
                value.ndim == 3
                and value.shape[-1] == 3
                and bool(((value >= 0) & (value <= 1)).all())
            )
            if not inside:
                raise ValueError(f"PatchPca.{name}: expected [h, w, 3] in 0..1, got {value.shape}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRegion:
    """A region of a picture or of a view, in shares of its height and width."""

    top: float
    left: float
    bottom: float
    right: float
    text: str
    number: int
    """Of the region in its picture, by which it is found again in the views."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownView:
    """A view as training sees it, and the region of the upright picture that it was cut of."""

    picture: Picture  # [S, S, 3]
    y: float
    x: float
    height: float
    width: float
    is_mirrored: bool
    is_local: bool
    is_of_alternate: bool = False  # cut out of another picture of the same thing
    regions: Sequence[ShownRegion] = ()

    def __post_init__(self) -> None:
        check_picture("ShownView.picture", self.picture)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSample:
    """A sample with its annotations and views."""

    picture: Picture  # [h, w, 3], the upright picture, perhaps smaller than it is stored
    size: tuple[int, int]  # stored height and width in pixels
    sample_id: int
    group_id: int
    caption: str  # "": none
    category: str  # "": none
    columns: Sequence[tuple[str, str]] = ()  # name of a column, and its value in words
    views: Sequence[ShownView] = ()
    regions: Sequence[ShownRegion] = ()

    def __post_init__(self) -> None:
        check_picture("ShownSample.picture", self.picture)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenInput:
    """One input of a training step: the samples in it with their views, and what is encoded."""

    samples: Sequence[ShownSample]
    encoded: npt.NDArray[np.uint8]  # [S, S, 3], or [S, S, 4] where cells are hidden
    told: str
    """What was done to the samples, as a sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Guesses:
    """The classes that a run's category head guesses of held-out pictures."""

    logits: npt.NDArray[np.float32]  # [N, K]
    label: npt.NDArray[np.int64]  # [N], -1: none
    class_names: Sequence[str]  # K

    def __post_init__(self) -> None:
        if self.logits.shape != (len(self.label), len(self.class_names)):
            raise ValueError(
                f"Guesses.logits: expected [{len(self.label)}, {len(self.class_names)}], got "
                f"{list(self.logits.shape)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbours:
    """Pictures, and for some of them the others that are most similar by the encoder."""

    pictures: npt.NDArray[np.uint8]  # [N, 3, S, S]
    queries: Sequence[int]  # Q
    found: npt.NDArray[np.int64]  # [Q, k]
    is_right: npt.NDArray[np.bool_]  # [Q, k], whether it has the query's class


@dataclass(frozen=True, kw_only=True, slots=True)
class DataEvaluation:
    """What `m3i-fast evaluate MODEL --data DIR` left in its folder."""

    name: str
    """Of the folder."""
    results: Mapping[str, Any]
    """Content of results.json."""
    class_names: Sequence[str] = ()
    label: npt.NDArray[np.int64] | None = None  # [N], -1: none
    """Of the measured rows; None in an evaluation of a version that kept none."""
    pictures: Mapping[int, Picture] = field(default_factory=dict)
    """Some of the measured pictures, by row."""
    picture_names: Mapping[int, str] = field(default_factory=dict)
    """A caption of each, or the name of its file."""
    arrays: Sequence[Mapping[str, npt.NDArray[Any]]] = ()
    """By encoder, and by `<measure>.<array>`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportInputs:
    """Everything that the page shows; what a run has not is empty or None, with its reason."""

    title: str
    curves: Curves
    """What the run logged (`observe.metrics.read_curves`); empty: no step was logged."""
    num_steps: int
    """Steps that the run has taken."""
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    notes: Sequence[str] = ()
    """Sentences at the top, such as whether the run is complete."""
    evaluation: Mapping[str, Any] | None = None
    """Content of evaluation.json. With `trained_minus` in it ({measure: {source: {difference, low,
    high}}}) the page judges by these intervals; without, it says that none was computed."""
    data_evaluations: Sequence[DataEvaluation] = ()
    """Evaluations of the run on labelled or captioned pictures."""
    mixed_pair: MixedPair | None = None
    """Explains the method, where two pictures share an input by blocks of cells."""
    seen: Sequence[SeenInput] = ()
    retrieval: Sequence[RetrievalRow] = ()
    retrieval_choice: str = ""
    """How the shown captions were chosen, as a sentence."""
    retrieval_ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Rank of the right picture of every held-out caption, 0 = first, by each encoder."""
    neighbours: Neighbours | None = None
    guesses: Guesses | None = None
    patch_pca: Sequence[PatchPca] = ()
    speed_notes: Sequence[str] = ()
    """Sentences of a profile of the run."""
    changed: Sequence[tuple[str, str, str]] = ()
    """Fields of the config that differ from its recipe: name, recipe's value, run's value."""
    recipe: str = ""
    """Recipe that it is compared with."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the run keeps of its data, and what the data say of themselves."""
    initial_weights: Mapping[str, Any] = field(default_factory=dict)
    """What the run began from, in short; empty: its own initialisation."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Why a part is left out, as a sentence, by its name: seen, retrieval, classes, features."""
    attribution: str = ""
    """Author and licence of the pictures."""

    def __post_init__(self) -> None:
        if self.evaluation is not None and "held_out_concepts" not in self.evaluation:
            raise ValueError(
                "ReportInputs.evaluation: expected held_out_concepts among its keys, "
                f"got {sorted(self.evaluation)}"
            )
        for who, ranks in self.retrieval_ranks.items():
            if not ranks or not all(0 <= rank < len(ranks) for rank in ranks):
                raise ValueError(
                    f"ReportInputs.retrieval_ranks[{who}]: expected a rank of each caption among "
                    f"as many pictures, got {list(ranks)}"
                )
        if self.retrieval and not self.retrieval_ranks:
            raise ValueError(
                "ReportInputs.retrieval_ranks: expected the ranks of all captions, got none"
            )


def check_picture(name: str, picture: Picture) -> None:
    """Raise ValueError unless the picture is [H, W, 3] uint8."""
    if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"{name}: expected [H, W, 3] uint8, got {picture.shape} {picture.dtype}")


def _check_inside(name: str, box: npt.NDArray[np.float32], picture: Picture) -> None:
    y, x, height, width = (float(value) for value in box[:4])
    rows, columns = picture.shape[:2]
    if min(y, x) < -1 or y + height > rows + 1 or x + width > columns + 1:  # boxes are rounded
        raise ValueError(
            f"{name}: expected a box inside {rows} x {columns} pixels, got y {y:g}, x {x:g}, "
            f"height {height:g}, width {width:g}"
        )
