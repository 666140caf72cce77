"""Which kind of source a path is: told by what lies there, unless a flag says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from m3i_fast.durable_files import what_is_at
from m3i_fast.pipelines.dataset.manifest import is_dataset
from m3i_fast.pipelines.packing.items import Listing, Reader, SourceOptions, split_called
from m3i_fast.pipelines.packing.readers.folders import (
    Folders,
    Found,
    find_pictures,
    is_picture,
    split_folders,
)
from m3i_fast.pipelines.packing.readers.huggingface import HuggingFace, is_saved
from m3i_fast.pipelines.packing.readers.named_columns import refuse_columns
from m3i_fast.pipelines.packing.readers.packed import Packed
from m3i_fast.pipelines.packing.readers.tables import (
    LINES_OF_JSON,
    TEXT_SUFFIXES,
    Tables,
    table_files,
)
from m3i_fast.pipelines.packing.readers.tars import COMPRESSED, PLAIN, Tars, tar_files
from m3i_fast.pipelines.packing.readers.torchvision_sets import TorchvisionSets, guess_class

READERS: dict[str, Callable[[SourceOptions], Reader]] = {
    "imagefolder": Folders,
    "folder": Folders,
    "table": Tables,
    "tars": Tars,
    "huggingface": HuggingFace,
    "packed": Packed,
    "torchvision": TorchvisionSets,
}


def resolve(options: SourceOptions) -> tuple[SourceOptions, str]:
    """Fill in the kind of a source, and say why it is taken for that.

    Raises FileNotFoundError where there is nothing, ValueError where no kind fits.
    """
    if not options.path.exists():
        raise FileNotFoundError(
            f"SOURCE: expected a file or folder, got {what_is_at(options.path)}"
        )
    if options.kind != "auto":
        return options, f"{options.kind} (--kind)"
    if is_dataset(options.path) and not _asked_of_files(options):
        kind, why = "packed", "a data set of m3i-fast data"
    else:
        guess = _guess(options.path, follow_links=options.allow_outside)
        kind, why = guess.kind, guess.why
        options = replace(options, path=options.path / guess.below)
    return replace(options, kind=kind), f"{kind}: {why}; another by --kind"


def make_reader(options: SourceOptions) -> Reader:
    """Return the reader of a source whose kind is known; ValueError for flags it does not take."""
    if options.kind == "packed" and (flags := _asked_of_files(options)):
        raise ValueError(
            f"{flags[0]}: expected with --kind tars, which reads the tars' files anew, got --kind "
            "packed, which takes what the data set says of its samples"
        )
    if options.kind not in ("table", "huggingface", "tars"):
        refuse_columns(options)
    return READERS[options.kind](options)


def _asked_of_files(options: SourceOptions) -> list[str]:
    """Return the flags that say where in a source's files captions, classes and others are."""
    asked = {
        "--image-column": options.image_column,
        "--caption-column": options.caption_columns,
        "--json-caption": options.json_captions,
        "--label-column": options.label_column,
        "--class-names": options.class_names,
        "--column": options.columns,
        "--group-column": options.group_column,
        "--split-column": options.split_column,
    }
    return [flag for flag, value in asked.items() if value not in (None, ())]


# What a folder of all pictures of a split is called, which is no class.
HOLDERS = frozenset(("images", "image", "imgs", "img", "jpegimages", "pictures", "photos"))


class Guess(NamedTuple):
    """A kind of source, why it is taken for that, and the folder below the path that it is."""

    kind: str
    why: str
    below: str = "."


def _guess(path: Path, *, follow_links: bool) -> Guess:
    if path.is_file():
        return _guess_file(path)
    if is_saved(path):
        return Guess("huggingface", "a data set that was saved by save_to_disk")
    if (known := guess_class(path)) is not None:
        why = f"the folder of torchvision.datasets.{known} (--torchvision-class)"
        return Guess("torchvision", why)
    listing, others = Listing(), Counter[str]()
    pictures = find_pictures(path, listing, others, allow_outside=True, follow_links=follow_links)
    tars, tables = others[".tar"] + others[".tgz"], others[".parquet"]
    if pictures and (tars or tables):
        other, kind = (f"{tars} tars", "tars") if tars else (f"{tables} Parquet files", "table")
        raise ValueError(
            f"SOURCE: expected one kind of source, got {len(pictures)} pictures and {other} below "
            f"{path}: say which by --kind folder (imagefolder: a folder a class) or --kind {kind}"
        )
    if not pictures:
        if tar_files(path):
            return Guess("tars", "a folder of tars")
        if table_files(path):
            return Guess("table", "a folder of Parquet files")
        if listing.refusals:
            return Guess("folder", "pictures, of which none is of a kind that is read")
        said = "; ".join(listing.notes) or "it has no files"
        raise ValueError(
            f"SOURCE: expected pictures, tars or Parquet files below {path}, got none: {said}; "
            "name the folder that holds the pictures"
        )
    return _guess_folders(pictures)


def _guess_file(path: Path) -> Guess:
    name = path.name.lower()
    if name.endswith((*TEXT_SUFFIXES, LINES_OF_JSON, ".parquet")):
        return Guess("table", f"a {path.suffix} file")
    if name.endswith(PLAIN + COMPRESSED):
        return Guess("tars", "a tar")
    advice = "name its folder" if is_picture(path) else "say what it is by --kind"
    if name.endswith(".json"):
        advice = (
            "name the folder of the pictures, with --column NAME:regions=FILE for COCO's boxes, or "
            "write captions and labels to a .csv or .jsonl"
        )
    raise ValueError(
        f"SOURCE: expected a folder, a table (.csv, .tsv, .jsonl, .parquet) or a tar, got {path}; "
        + advice
    )


def _guess_folders(pictures: Sequence[Found]) -> Guess:
    """Tell whether folders are splits, perhaps below a folder that holds all, and classes."""
    paths = [picture.path for picture in pictures]
    below = _above_splits(paths)
    paths = [path.removeprefix(below) for path in paths]
    if splits := split_folders(paths):
        is_labelled = _have_classes(paths, splits)
        said = "with a folder a class in them" if is_labelled else "without folders of classes"
        kind = "imagefolder" if is_labelled else "folder"
        return Guess(kind, f"{below} has folders of splits, {said}".strip(), below or ".")
    numbers = Counter(path.rpartition("/")[0] for path in paths)
    strays = numbers.pop("", 0)
    if any("/" in name for name in numbers) or len(numbers) < 2 or 10 * strays > len(paths):
        return Guess("folder", "pictures, of which the folders do not look like classes")
    are_captioned = 2 * sum(picture.has_text for picture in pictures) > len(pictures)
    if are_captioned and all(name.isdecimal() for name in numbers):
        return Guess("folder", "folders of numbers, with texts beside pictures, as img2dataset's")
    which = f"all but {strays} of the pictures are" if strays else "every picture is"
    return Guess("imagefolder", f"{which} in one of {len(numbers)} folders, a class each")


def _above_splits(paths: Sequence[str]) -> str:
    """Return the folder of all pictures in which there are splits, as "images/"; empty: none."""
    below = ""
    while not split_folders([path.removeprefix(below) for path in paths]):
        top, is_folder, _ = paths[0].removeprefix(below).partition("/")
        below += f"{top}/"
        if not is_folder or not all(path.startswith(below) for path in paths):
            return ""
    return below


def _have_classes(paths: Sequence[str], splits: Set[str]) -> bool:
    """Return whether the pictures for training are in folders of classes.

    Those of another split are as well, or in no folders at all.
    """
    classes: set[str] = set()
    for split in splits:
        inside = [path.removeprefix(f"{split}/") for path in paths if path.startswith(f"{split}/")]
        depths = Counter(path.count("/") for path in inside)
        is_labelled = 10 * depths[1] >= 9 * len(inside) and {*depths} <= {0, 1}
        if not is_labelled and {*depths} != {0}:
            return False
        if is_labelled and split_called(split) == "train":
            classes |= {path.partition("/")[0] for path in inside if "/" in path}
    return len(classes) > 1 or not {name.lower() for name in classes} <= HOLDERS
