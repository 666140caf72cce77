"""Inputs of a data set's page. Pictures are uint8 RGB arrays, everything else is plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from m3i_fast.report.inputs import Picture, ShownSample


@dataclass(frozen=True, kw_only=True, slots=True)
class NearPair:
    """Two pictures that are nearly equal and in different groups."""

    pictures: tuple[Picture, Picture]
    sample_ids: tuple[int, int]
    splits: tuple[str, str]
    distance: float  # root mean square difference of their thumbnails, 0..1


class Refusal(NamedTuple):
    """A file, or a sample in one, that is not in the data set."""

    name: str
    reason: str
    what_to_do: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """Values of the pictures of the split that were read for the histograms, in order."""

    labels: Sequence[int]  # -1: none
    num_tokens: Sequence[int]  # of the first caption; 0: none
    sizes: Sequence[tuple[int, int]]  # height, width

    def __post_init__(self) -> None:
        if not len(self.labels) == len(self.num_tokens) == len(self.sizes) > 0:
            raise ValueError(
                "Counted: expected as many labels, num_tokens and sizes, and at least one, got "
                f"{len(self.labels)}, {len(self.num_tokens)} and {len(self.sizes)}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPageInputs:
    """Everything that the page of a data set shows."""

    name: str
    split: str
    num_samples: int
    num_captions: int
    num_labels: int
    num_groups: int
    class_names: Sequence[str]
    context_length: int
    counted: Counted
    samples: Sequence[ShownSample]
    views_of: str
    """Recipe or file that says how views are cut."""
    views_config: Mapping[str, Any]
    """Its views, flat: {"global_views.size": 224}."""
    compared: Mapping[str, int]
    """Pictures of each split that were compared with all others."""
    num_near: int
    """Pairs of them that are nearly equal and in different groups."""
    num_near_in_group: int
    """Pairs of them that are nearly equal and in one group."""
    near: Sequence[NearPair]
    """Some of the pairs in different groups."""
    refused: Sequence[Refusal] | None
    """What packing or indexing left out; None: nothing says so."""
    attribution: str = ""
    columns: Sequence[Mapping[str, Any]] = ()
    """Each named column's column, kind, number of names, and known, of how many pictures."""
    near_grouped: Mapping[str, int] | None = None
    """Pictures, groups, and pictures with a near duplicate in another split, as packing counted
    them; None: it did not look for near duplicates."""
