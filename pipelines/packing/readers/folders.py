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
MOST_NAMED = 20  # folders in a note


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


def find_pictures(
    root: Path, listing: Listing, *, allow_outside: bool, follow_links: bool
) -> list[Found]:
    """Find all files below a folder that are called like pictures, folder by folder, sorted.

    Refuses what leads out of it and pictures of kinds that are not read, and notes the number of
    other files. follow_links: look also into folders that symbolic links lead to, each folder once.
    """
    real = root.resolve()
    found: list[Found] = []
    others: Counter[str] = Counter()
    for path, is_folder_link in _files(root, listing, follow_links=follow_links):
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
                raise _refused_link(follow_links)
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


def _refused_link(follow_links: bool) -> Refused:
    if follow_links:
        return Refused(
            "a folder whose pictures are read by another name", "remove one of the links to it"
        )
    return Refused(
        "a symbolic link to a folder, which is not followed",
        "say --allow-outside, or name the folder that it leads to as a source of its own",
    )


def _files(root: Path, listing: Listing, *, follow_links: bool) -> Iterator[tuple[Path, bool]]:
    """Yield (path, whether it is a link to a folder that is not followed), in order of names."""
    entered = {root.resolve()}

    def failed(error: OSError) -> None:
        name = os.path.relpath(error.filename or root, root)
        listing.refuse(
            printable(name), f"cannot be read: {error.strerror}", "change its permissions"
        )

    for folder, folders, files in os.walk(root, onerror=failed, followlinks=follow_links):
        hidden = sorted(filter(_is_hidden, folders))
        for name in hidden:  # .ipynb_checkpoints, .git and the like would be classes
            folders.remove(name)
            where = printable(Path(folder, name).relative_to(root).as_posix())
            listing.notes.append(f"{where} is a hidden folder, which is not looked into")
        folders.sort()
        if follow_links:
            left = _without_entered(Path(folder), folders, root.resolve(), entered)
        else:
            left = {name for name in folders if os.path.islink(os.path.join(folder, name))}
        folders[:] = [name for name in folders if name not in left]
        for name in sorted([*files, *left]):
            yield Path(folder, name), name in left


def _without_entered(folder: Path, names: list[str], root: Path, entered: set[Path]) -> set[str]:
    """Return the folders that are entered already, or by their own names; add the others.

    A link into the source would give its pictures twice, a link to a folder above it without end.
    """
    again = set()
    for name in names:
        path = folder / name
        real = path.resolve()
        if real in entered or (path.is_symlink() and real.is_relative_to(root)):
            again.add(name)
        entered.add(real)
    return again


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


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
        outside = self.options.allow_outside
        found = find_pictures(
            self.options.path, listing, allow_outside=outside, follow_links=outside
        )
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
        if self.by_class and found:
            self._note_empty(listing, splits if has_splits else {"."}, set(names))
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

    def _note_empty(self, listing: Listing, parents: set[str], classes: set[str]) -> None:
        """Note the folders beside those of classes that hold no picture."""
        empty = sorted(
            {
                entry.name
                for parent in parents
                for entry in os.scandir(self.options.path / parent)
                if entry.is_dir(follow_symlinks=self.options.allow_outside)
                and not _is_hidden(entry.name)
            }
            - classes
        )
        if empty:
            names = ", ".join(map(printable, empty[:MOST_NAMED]))
            more = f" and {len(empty) - MOST_NAMED} more" if len(empty) > MOST_NAMED else ""
            listing.notes.append(
                f"folders without a picture that is read, which are no classes: {names}{more}"
            )

    def read(self, place: Place) -> bytes:
        return read_picture(self.options.path / str(place[0]))
