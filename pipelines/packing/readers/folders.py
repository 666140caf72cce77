"""Pictures in folders: plain, or a folder a class (ImageFolder), by split, with captions beside.

A caption is a text of its picture's name, cat.txt of cat.jpg, as img2dataset and kohya write it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from m3i_fast.pipelines.packing.items import (
    UNKNOWN,
    Item,
    Listing,
    Place,
    Refused,
    SourceOptions,
    Stamp,
    check_inside,
    clean_captions,
    printable,
    read_picture,
    refusal_of,
    split_called,
    text_of,
)
from m3i_fast.pipelines.packing.readers.named_columns import assign_columns

TEXT = ".txt"
PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .dib .tif .tiff .gif .ico .ppm .pgm .pbm .pnm".split()
)
MOST_NAMED = 20  # folders in a note
MOST_CAPTION_BYTES = 1 << 20
LOOKED_AT = 20  # texts beside pictures, to tell captions from numbers
NUMBERS = re.compile(r"[\d\s.,;:eE+-]*")  # as boxes beside pictures, which YOLO reads
# Of a folder of pictures, by the datasets library.
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


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
    has_text: bool = False  # whether a .txt of the same name lies beside it


def find_pictures(
    root: Path,
    listing: Listing,
    others: Counter[str],
    *,
    allow_outside: bool,
    follow_links: bool,
) -> list[Found]:
    """Find all files below a folder that are called like pictures, folder by folder, sorted.

    Refuses what leads out of it and pictures of kinds that are not read, notes the number of other
    files, and counts them in `others` by their suffix. follow_links: look also into folders that
    symbolic links lead to, each folder once.
    """
    real = root.resolve()
    found: list[Found] = []
    texts: set[str] = set()
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
            if path.suffix == TEXT:
                texts.add(name.removesuffix(path.suffix))
            if path.name in TABLES:
                listing.notes.append(
                    f"{printable(name)} is not read: to pack what it says, name it as SOURCE"
                )
            continue
        try:
            if is_folder_link:
                raise _refused_link(follow_links)
            if not allow_outside and path.is_symlink():  # no folder that is a link is looked into
                check_inside(path, real)
            status = path.stat()
            found.append(Found(name, (status.st_size, status.st_mtime_ns)))
        except Refused as refused:
            listing.refusals.append(refused.of(printable(name)))
        except OSError as error:
            listing.refusals.append(refusal_of(error).of(printable(name)))
    if texts:
        found = [one._replace(has_text=os.path.splitext(one.path)[0] in texts) for one in found]
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
        reason = refusal_of(error).reason
        listing.refuse(printable(name), reason, "change its permissions")

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


def split_folders(paths: Sequence[str]) -> set[str]:
    """Return the first folders of paths that are called like splits, one of them for training.

    None where more than a tenth of the paths are in no such folder; nor where any is and all of
    these are of one split, beside which the others may be classes.
    """
    tops = Counter(path.partition("/")[0] if "/" in path else "" for path in paths)
    splits = {top: split for top in tops if (split := split_called(top)) is not None}
    outside = len(paths) - sum(tops[top] for top in splits)
    if "train" not in splits.values() or outside * 10 > len(paths):
        return set()
    return set() if outside and len(set(splits.values())) == 1 else set(splits)


class Folders:
    """Reader of pictures that are files below a folder."""

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.folder = options, options.path
        self.by_class = options.kind == "imagefolder"
        asked = options.caption_columns
        if wrong := [name for name in asked if name not in ("", TEXT[1:])]:
            raise ValueError(
                f"--caption-column: expected {TEXT[1:]}, or '' for none, of pictures in folders, "
                f"got {wrong[0]}"
            )

    def list(self) -> Listing:
        listing = Listing()
        outside = self.options.allow_outside
        found = find_pictures(
            self.options.path, listing, Counter(), allow_outside=outside, follow_links=outside
        )
        splits = split_folders([picture.path for picture in found])
        if splits:
            said = ", ".join(f"{name} (as {split_called(name)})" for name in sorted(splits))
            listing.notes.append(f"splits are folders: {said}")
        has_captions = self._has_captions(found, listing)
        classes: list[str] = []
        for picture in found:
            try:
                split, name = self._split_and_class(picture, splits)
                captions: tuple[str, ...] = ()
                if has_captions and picture.has_text:
                    captions = clean_captions((self._text(picture),))
            except Refused as refused:
                listing.refusals.append(refused.of(printable(picture.path)))
                continue
            classes.append(name)
            listing.items.append(
                Item(
                    name=printable(picture.path),
                    place=(picture.path,),
                    split=split,
                    captions=captions,
                    stamp=picture.stamp,
                )
            )
        names = sorted(set(classes) - {""})
        if self.by_class and found:
            self._note_empty(listing, splits or {"."}, set(names))
            if without := classes.count(""):
                listing.notes.append(
                    f"{without} pictures are in no folder of a class, and have no label"
                )
        number = {name: i for i, name in enumerate(names)}
        listing.class_names = tuple(map(printable, names))
        listing.items = [
            item._replace(label=number.get(name, -1))
            for item, name in zip(listing.items, classes, strict=True)
        ]
        assign_columns(listing, self.options, {})
        return listing

    def _split_and_class(self, picture: Found, splits: set[str]) -> tuple[str, str]:
        """Return the split and the class of a picture, empty for none; raises Refused."""
        folders = picture.path.split("/")[:-1]
        top = folders.pop(0) if splits and folders else ""
        if splits and top not in splits:
            raise Refused(
                "expected a folder of its split, got none",
                f"move it into {' or '.join(sorted(splits))}, or out of SOURCE",
            )
        is_labelled = self.by_class and folders
        return split_called(top) or "train", folders[0] if is_labelled else ""

    def _has_captions(self, found: Sequence[Found], listing: Listing) -> bool:
        """Return whether the texts beside pictures are captions, and note what was chosen."""
        with_text = [picture for picture in found if picture.has_text]
        if self.options.caption_columns or not with_text:
            return TEXT[1:] in self.options.caption_columns
        texts = []
        for picture in with_text[:LOOKED_AT]:
            with suppress(Refused):
                texts.append(self._text(picture))
        if all(NUMBERS.fullmatch(text) for text in texts):
            listing.notes.append(
                f"the {TEXT} beside pictures hold numbers, which are no captions "
                f"(--caption-column {TEXT[1:]} for captions all the same)"
            )
            return False
        listing.notes.append(
            f"captions: the {TEXT} beside {len(with_text)} of {len(found)} pictures "
            "(--caption-column '' for none)"
        )
        return True

    def _text(self, picture: Found) -> str:
        """Read the text beside a picture; raises Refused."""
        file = (self.options.path / picture.path).with_suffix(TEXT)
        try:
            if not self.options.allow_outside and file.is_symlink():
                check_inside(file, self.options.path.resolve())
            if file.stat().st_size > MOST_CAPTION_BYTES:
                raise Refused(
                    f"{file.name}: expected at most {MOST_CAPTION_BYTES} bytes of text",
                    "shorten it",
                )
            return text_of(read_picture(file))
        except OSError as error:
            raise refusal_of(error, self.options.path) from None

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

    def read(self, place: Place, listed: Stamp = UNKNOWN) -> bytes:
        return read_picture(self.options.path / str(place[0]), listed)
