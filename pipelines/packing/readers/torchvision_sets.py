"""A data set of torchvision that lies on disk: CIFAR10, MNIST, Food101 and others, by its class."""

from __future__ import annotations

import inspect
import io
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.packing.items import (
    UNKNOWN,
    Item,
    Listing,
    Place,
    Refused,
    SourceOptions,
    Stamp,
    split_of_cell,
    stamp,
)
from m3i_fast.pipelines.packing.readers.labels import assign_labels

# Folders that their classes look for, as far as these are told by them.
FOLDER_OF = {
    "cifar-10-batches-py": "CIFAR10",
    "cifar-100-python": "CIFAR100",
    "MNIST": "MNIST",
    "FashionMNIST": "FashionMNIST",
    "KMNIST": "KMNIST",
    "QMNIST": "QMNIST",
    "food-101": "Food101",
    "oxford-iiit-pet": "OxfordIIITPet",
    "flowers-102": "Flowers102",
    "stl10_binary": "STL10",
    "dtd": "DTD",
    "eurosat": "EuroSAT",
    "caltech101": "Caltech101",
    "gtsrb": "GTSRB",
    "country211": "Country211",
    "stanford_cars": "StanfordCars",
}
_SPLIT_VALUES = ("train", "trainval", "val", "valid", "test", "extra", "unlabeled")


def guess_class(path: Path) -> str | None:
    """Return the class whose folder stands below a path; None: none is known."""
    return next((name for folder, name in FOLDER_OF.items() if (path / folder).is_dir()), None)


class TorchvisionSets:
    """Reader of such a data set, all splits that are there; its pictures are stored as PNG.

    A pickle of CIFAR runs code when it is read: torchvision compares its MD5 with the published one
    before.
    """

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.folder = options, options.path

    @cached_property
    def _splits(self) -> dict[str, Any]:
        name = self.options.torchvision_class or guess_class(self.options.path) or ""
        made: Any = getattr(require("torchvision.datasets"), name, None)
        if not callable(made):
            raise ValueError(
                f"--torchvision-class: expected a class of torchvision.datasets, got {name!r}"
            )
        takes = inspect.signature(made).parameters
        root = str(self.options.path)
        choices: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
        if name == "EMNIST":  # whose six kinds of splits share pictures; this one has all of them
            choices = {key: {"split": "byclass", **value} for key, value in choices.items()}
        elif "train" in takes:
            pass
        elif "split" in takes:
            choices = {value: {"split": value} for value in _SPLIT_VALUES}
        else:
            choices = {"train": {}}
        found, errors = {}, []
        for split, arguments in choices.items():
            try:
                found[split] = made(root, **arguments)
            except (ValueError, RuntimeError, OSError, ImportError) as error:
                errors.append(f"{split}: {error}")
        if not found:
            raise ValueError(f"{root}: {name} finds no data ({'; '.join(errors)})")
        # Those for training and for validation together, which some data sets have besides both.
        if (both := found.pop("trainval", None)) is not None and "train" not in found:
            found = {"train": both, **found}
        return found

    def list(self) -> Listing:
        listing = Listing()
        for folder, _, files in os.walk(self.options.path):
            for file in map(Path(folder).joinpath, files):
                listing.files[file.relative_to(self.options.path).as_posix()] = stamp(file)
        labels: list[object] = []
        names = self.options.class_names
        for split, pictures in self._splits.items():
            names = names or tuple(map(_class_name, getattr(pictures, "classes", ())))
            known = _labels(pictures)
            for number in range(len(pictures)):
                label = known[number] if known is not None else pictures[number][1]
                if not isinstance(label, int):
                    raise ValueError(
                        f"{type(pictures).__name__}: expected a class of each picture, got "
                        f"{type(label).__name__}"
                    )
                listing.items.append(
                    Item(f"{split}[{number}]", (split, number), split=split_of_cell(split))
                )
                labels.append(label)
        listing.notes.append(f"splits of torchvision: {', '.join(self._splits)}")
        assign_labels(listing, labels, class_names=names, label_as="index")
        return listing

    def read(self, place: Place, listed: Stamp = UNKNOWN) -> bytes:
        pictures = self._splits[str(place[0])]
        try:
            picture = pictures[int(place[1])][0]
        except (OSError, SyntaxError, ValueError) as error:
            raise Refused(f"corrupt or empty image: {error}", "replace or remove it") from None
        content = io.BytesIO()
        picture.save(content, "PNG")
        return content.getvalue()


def _labels(pictures: Any) -> list[int] | None:
    """Return all labels where the data set holds them, so that no picture is read for them."""
    for name in ("targets", "labels", "_labels", "y"):
        found = getattr(pictures, name, None)
        if found is None or getattr(found, "ndim", 1) != 1:  # QMNIST's are rows of numbers
            continue
        if len(found) == len(pictures):
            return [int(label) for label in found]
    return None


def _class_name(name: Any) -> str:
    return name if isinstance(name, str) else ", ".join(map(str, name))
