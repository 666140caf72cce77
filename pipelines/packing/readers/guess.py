"""Which kind of source a path is: told by what lies there, unless a flag says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from m3i_fast.pipelines.dataset.manifest import is_dataset
from m3i_fast.pipelines.packing.items import Listing, Reader, SourceOptions
from m3i_fast.pipelines.packing.readers.folders import (
    Folders,
    are_splits,
    find_pictures,
    is_picture,
)
from m3i_fast.pipelines.packing.readers.huggingface import HuggingFace, is_saved
from m3i_fast.pipelines.packing.readers.named_columns import refuse_columns
from m3i_fast.pipelines.packing.readers.packed import Packed
from m3i_fast.pipelines.packing.readers.tables import TEXT_SUFFIXES, Tables, table_files
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
        raise FileNotFoundError(f"SOURCE: expected a file or folder, got none at {options.path}")
    if options.kind != "auto":
        return options, f"{options.kind} (--kind)"
    if is_dataset(options.path) and not _asked_of_files(options):
        kind, why = "packed", "a data set of m3i-fast data"
    else:
        kind, why = _guess(options.path, follow_links=options.allow_outside)
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


def _guess(path: Path, *, follow_links: bool) -> tuple[str, str]:
    if path.is_file():
        name = path.name.lower()
        if name.endswith((*TEXT_SUFFIXES, ".parquet")):
            return "table", f"a {path.suffix} file"
        if name.endswith(PLAIN + COMPRESSED):
            return "tars", "a tar"
        raise ValueError(
            f"SOURCE: expected a folder, a table (.csv, .tsv, .parquet) or a tar, got {path}; "
            + ("name its folder" if is_picture(path) else "say what it is by --kind")
        )
    if is_saved(path):
        return "huggingface", "a data set that was saved by save_to_disk"
    if (known := guess_class(path)) is not None:
        return "torchvision", f"the folder of torchvision.datasets.{known} (--torchvision-class)"
    listing = Listing()
    pictures = find_pictures(path, listing, allow_outside=True, follow_links=follow_links)
    if not pictures:
        if tar_files(path):
            return "tars", "a folder of tars"
        if table_files(path):
            return "table", "a folder of Parquet files"
        if listing.refusals:
            return "folder", "pictures, of which none is of a kind that is read"
        said = "; ".join(listing.notes) or "it has no files"
        raise ValueError(
            f"SOURCE: expected pictures, tars or Parquet files below {path}, got none: {said}"
        )
    folders = {tuple(picture.path.split("/")[:-1]) for picture in pictures}
    depths, top = {len(names) for names in folders}, {names[0] for names in folders if names}
    if depths == {1} and len(folders) > 1 and not are_splits(top):
        return "imagefolder", f"every picture is in one of {len(folders)} folders, a class each"
    if depths == {2} and are_splits(top):
        return "imagefolder", "folders of splits, with a folder a class in them"
    return "folder", "pictures, of which the folders do not look like classes"
