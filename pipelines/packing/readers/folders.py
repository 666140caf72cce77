"""Pictures in folders: plain, without labels, or a folder a class (ImageFolder), also by split."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from m3i_fast.pipelines.packing.items import (
    SPLITS,
    Item,
    Listing,
    Place,
    Refused,
    SourceOptions,
    Stamp,
    check_inside,
    printable,
    read_picture,
)
from m3i_fast.pipelines.packing.readers.named_columns import assign_columns

PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ico .ppm .pgm .pbm .pnm".split()
)


# Pictures that are not read, by what their files are called.
UNREAD = {
    ".avif": "AVIF",
    ".bpg": "BPG",
    ".dds": "DDS",
    ".eps": "EPS",
    ".exr": "OpenEXR",
    ".hdr": "Radiance HDR",
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".icns": "ICNS",
    ".j2k": "JPEG 2000",
    ".jp2": "JPEG 2000",
    ".jpf": "JPEG 2000",
    ".jxl": "JPEG XL",
    ".pcx": "PCX",
    ".psd": "Photoshop",
    ".svg": "SVG",
    ".svgz": "SVG",
    ".tga": "TGA",
    ".xcf": "GIMP",
    ".xpm": "XPM",
    **dict.fromkeys(".arw .cr2 .cr3 .dng .nef .orf .raf .rw2".split(), "camera raw"),
}


class Found(NamedTuple):
    """A file that is called like a picture."""

    path: str  # below the folder, with "/"
    stamp: Stamp


def find_pictures(root: Path, listing: Listing, *, allow_outside: bool) -> list[Found]:
    """Find all files below a folder that are called like pictures, folder by folder, sorted.

    Refuses what leads out of it and pictures of kinds that are not read, and notes the number of
    other files.
    """
    real = root.resolve()
    found: list[Found] = []
    others: Counter[str] = Counter()
    for path, is_folder_link in _files(root, listing):
        name = path.relative_to(root).as_posix()
        suffix = path.suffix.lower()
        if not is_folder_link and suffix in UNREAD:
            listing.refuse(
                printable(name),
                f"{UNREAD[suffix]} pictures are not read",
                "convert it to JPEG or PNG",
            )
            continue
        if not is_folder_link and suffix not in PICTURE_SUFFIXES:
            others[suffix if suffix.isprintable() and suffix.isascii() else "other"] += 1
            continue
        try:
            if is_folder_link:
                raise Refused(
                    "a symbolic link to a folder, which is not followed",
                    "name the folder that it leads to as a source of its own",
                )
            if not allow_outside:
                check_inside(path, real)
            status = path.stat()
            found.append(Found(name, (status.st_size, status.st_mtime_ns)))
        except Refused as refused:
            listing.refusals.append(refused.of(printable(name)))
        except OSError as error:
            listing.refuse(
                printable(name), f"cannot be read: {error.strerror}", "mend or remove it"
            )
    if others:
        kinds = ", ".join(
            f"{n} {suffix or 'without suffix'}" for suffix, n in others.most_common(5)
        )
        listing.notes.append(f"{others.total()} files are not called like pictures: {kinds}")
    return found


def _files(root: Path, listing: Listing) -> Iterator[tuple[Path, bool]]:
    """Yield (path, whether it is a link to a folder) below a folder, in order of names."""

    def failed(error: OSError) -> None:
        name = os.path.relpath(error.filename or root, root)
        listing.refuse(
            printable(name), f"cannot be read: {error.strerror}", "change its permissions"
        )

    for folder, folders, files in os.walk(root, onerror=failed):
        hidden = sorted(name for name in folders if name.startswith(".") or name == "__MACOSX")
        for name in hidden:  # .ipynb_checkpoints, .git and the like would be classes
            folders.remove(name)
            where = printable(Path(folder, name).relative_to(root).as_posix())
            listing.notes.append(f"{where} is a hidden folder, which is not looked into")
        folders.sort()
        links = {name for name in folders if os.path.islink(os.path.join(folder, name))}
        for name in sorted([*files, *links]):
            yield Path(folder, name), name in links


def is_picture(path: Path) -> bool:
    """Return whether a path is called like a picture."""
    return path.suffix.lower() in PICTURE_SUFFIXES


def are_splits(names: set[str]) -> bool:
    """Return whether all folders are called like splits, one of them for training."""
    return names <= set(SPLITS) and "train" in {SPLITS[name] for name in names}


class Folders:
    """Reader of pictures that are files below a folder."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.by_class = options.kind == "imagefolder"

    def list(self) -> Listing:
        listing = Listing()
        found = find_pictures(self.options.path, listing, allow_outside=self.options.allow_outside)
        splits = {picture.path.split("/")[0] for picture in found}
        has_splits = are_splits(splits)
        if has_splits:
            said = ", ".join(f"{name} (as {SPLITS[name]})" for name in sorted(splits))
            listing.notes.append(f"splits are folders: {said}")
        labelled: list[tuple[Found, str, str]] = []  # picture, split, class
        for picture in found:
            folders = picture.path.split("/")[:-1]
            split = SPLITS[folders.pop(0)] if has_splits else "train"
            if self.by_class and not folders:
                listing.refuse(
                    printable(picture.path),
                    "expected a folder of its class, got none",
                    "move it into the folder of its class, or say --kind folder",
                )
                continue
            labelled.append((picture, split, folders[0] if self.by_class else ""))
        names = sorted({name for _, _, name in labelled}) if self.by_class else []
        number = {name: i for i, name in enumerate(names)}
        listing.class_names = tuple(map(printable, names))
        listing.items = [
            Item(
                name=printable(picture.path),
                place=(picture.path,),
                split=split,
                label=number.get(name, -1),
                stamp=picture.stamp,
            )
            for picture, split, name in labelled
        ]
        assign_columns(listing, self.options, {})
        return listing

    def read(self, place: Place) -> bytes:
        return read_picture(self.options.path / str(place[0]))
