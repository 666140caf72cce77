"""What a source holds before it is packed: pictures by name and place, and what cannot be used."""

from __future__ import annotations

import errno
import math
import os
import re
import stat as modes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo

MAX_FILE_BYTES = 1 << 30
"""Most bytes of an encoded picture."""
Place = tuple[str | int, ...]  # where a reader finds the bytes of a picture
Stamp = tuple[int, int]  # bytes and time of the last change in ns
UNKNOWN: Stamp = (0, 0)


class Refusal(NamedTuple):
    """A file or row that is not packed, and why."""

    file: str
    reason: str
    what_to_do: str


class Refused(ValueError):
    """A picture, caption or label cannot be used."""

    def __init__(self, reason: str, what_to_do: str) -> None:
        super().__init__(reason)
        self.reason, self.what_to_do = reason, what_to_do

    def of(self, name: str) -> Refusal:
        """Return the refusal of a file of that name."""
        return Refusal(name, self.reason, self.what_to_do)


class SourceChanged(OSError):
    """A file of a source is not as it was when the source was listed."""


# What an error says of one file, while its storage is there.
_OF_THE_FILE = frozenset(
    (
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )
)


def refusal_of(error: OSError, source: Path | None = None) -> Refused:
    """Return why a file cannot be read; source: the folder that it lies in, which may be gone.

    Raises OSError where the error is of the storage: a pack that left its pictures out would be
    whole without them.
    """
    if isinstance(error, SourceChanged):
        raise error
    is_gone = error.errno == errno.ENOENT and source is not None and not _holds_files(source)
    if is_gone or (error.errno is not None and error.errno not in _OF_THE_FILE):
        raise OSError(
            error.errno,
            f"{error.strerror}, which is of the storage and not of this picture: start again when "
            "it is there, the pack goes on where it was",
            error.filename,
        ) from None
    reason = f"cannot be read: {error.strerror or error}"
    if error.errno == errno.ENOENT and error.filename and os.path.islink(error.filename):
        reason = "a symbolic link to a file that is not there"
    return Refused(reason, "mend or remove it")


def _holds_files(source: Path) -> bool:
    """Return whether a source is there; the folder of one that is not mounted is empty."""
    return source.is_file() or (source.is_dir() and any(source.iterdir()))


class Item(NamedTuple):
    """A picture of a source with its annotations, before it is read."""

    name: str  # in the source, printable, no two alike
    place: Place
    split: str = "train"
    captions: tuple[str, ...] = ()
    label: int = -1  # -1: none
    group: str = ""  # pictures of one group are near-duplicates; empty: a group of its own
    stamp: Stamp = UNKNOWN  # of the file, where a picture is one
    columns: tuple[tuple[str, Any], ...] = ()  # named ones, as JSON; texts are not tokenised


@dataclass(kw_only=True)
class Listing:
    """All that a source holds."""

    items: list[Item] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    class_names: tuple[str, ...] = ()
    columns: tuple[ColumnInfo, ...] = ()
    notes: list[str] = field(default_factory=list)  # what was guessed, for the user to read
    files: dict[str, Stamp] = field(default_factory=dict)  # that hold many pictures each

    def refuse(self, file: str, reason: str, what_to_do: str) -> None:
        """Record what is not packed."""
        self.refusals.append(Refusal(file, reason, what_to_do))

    @contextmanager
    def row(self, where: str) -> Iterator[None]:
        """Refuse a row that cannot be read, whatever its cells hold."""
        try:
            yield
        except Refused as refused:
            self.refusals.append(refused.of(where))
        except (ValueError, OverflowError) as error:
            self.refuse(where, f"cannot be read: {error}", "mend the row, or take it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Which source is read, and how; `guess.resolve` fills in what is None."""

    path: Path
    kind: str
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    label_column: str | None = None
    group_column: str | None = None
    split_column: str | None = None
    json_captions: tuple[str, ...] = ()
    image_root: Path | None = None
    delimiter: str | None = None
    class_names: tuple[str, ...] = ()
    label_as: str = "auto"
    merge_rows: bool = False
    allow_outside: bool = False
    torchvision_class: str | None = None
    columns: tuple[str, ...] = ()  # NAME:KIND or NAME:KIND=COLUMN,...
    max_unpacked_gib: float | None = None  # of a compressed file
    spool: Path | None = None  # a folder for pictures that cannot be read in any order


class Reader(Protocol):
    """Lists a source, and reads its pictures in any order, in any process."""

    @property
    def folder(self) -> Path:
        """Return the folder that names in `Listing.files` are relative to."""
        ...

    def list(self) -> Listing:
        """List all pictures; ValueError where the source as a whole cannot be used."""
        ...

    def read(self, place: Place, listed: Stamp = UNKNOWN) -> bytes:
        """Read the encoded picture at a place; raises Refused or OSError.

        listed: the item's stamp. Raises SourceChanged if the picture is a file with another stamp.
        """
        ...


def printable(name: str) -> str:
    """Return a name with escapes for bytes that are not UTF-8 and for control characters."""
    text = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def stamp(path: Path) -> Stamp:
    """Return the stamp of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def check_listed(folder: Path, files: Mapping[str, Stamp]) -> None:
    """Raise SourceChanged if a file has another size or time than when it was listed."""
    for name, listed in files.items():
        try:
            now = stamp(folder / name)
        except FileNotFoundError:
            raise changed(folder / name, "gone") from None
        if now != listed:
            was, is_now = (
                f"{size:,} bytes written at {datetime.fromtimestamp(ns / 1e9):%F %T.%f}"
                for size, ns in (listed, now)
            )
            raise changed(folder / name, f"{is_now}, and was {was}")


def changed(path: Path, how: str) -> SourceChanged:
    """Return the error of a file that is not as it was listed."""
    return SourceChanged(
        f"{path} was changed after SOURCE was listed: it is {how}. Start again when nothing writes "
        "to it: SOURCE is listed again, and what is done and did not change is kept"
    )


def keyed(items: Sequence[Item], files: Mapping[str, Stamp], *, is_shared: bool) -> list[Any]:
    """Return items and the files that hold many of them for the key of a result.

    is_shared: leave out when files were changed, which a copy of the source may not have kept.
    """
    if is_shared:
        items = [item._replace(stamp=(item.stamp[0], 0)) for item in items]
        files = {name: (size, 0) for name, (size, _) in files.items()}
    return [items, files]


def check_files(files: Sequence[Path], options: SourceOptions, listing: Listing) -> dict[str, Path]:
    """Return the files of a source that hold many pictures by their names, and note their stamps.

    Refuses links out of the source's folder, and what cannot be read.
    """
    named = options.path.is_file()  # by the user, who may name a link
    root = options.path.parent if named else options.path
    found = {}
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            if not (named or options.allow_outside):
                check_inside(file, root.resolve())
            listing.files[name] = stamp(file)
            found[name] = file
        except Refused as refused:
            listing.refusals.append(refused.of(printable(name)))
        except OSError as error:
            listing.refusals.append(refusal_of(error).of(printable(name)))
    return found


def read_picture(path: Path, listed: Stamp = UNKNOWN) -> bytes:
    """Read a picture's file; raises Refused for what is none, or too large to be one.

    listed: as of `Reader.read`.
    """
    status = path.stat()
    if not modes.S_ISREG(status.st_mode):
        raise Refused("expected a file, got a device, pipe or folder", "remove it")
    check_num_bytes(status.st_size)
    content = path.read_bytes()
    if listed != UNKNOWN:  # after the read: it may be written to meanwhile
        check_listed(path.parent, {path.name: listed})
    return content


def check_num_bytes(size: int) -> None:
    """Raise Refused where an encoded picture would be too large."""
    if size > MAX_FILE_BYTES:
        raise Refused(
            f"expected at most {MAX_FILE_BYTES} bytes, got {size}", "scale the picture down"
        )


def check_inside(path: Path, root: Path) -> None:
    """Raise Refused where a path, after its symbolic links, is not below `root`, a real path."""
    real = path.resolve()
    if not real.is_relative_to(root):
        kind = "a symbolic link" if path.absolute() != real and path.is_symlink() else "a path"
        raise Refused(
            f"{kind} out of the source's folder",
            "copy the file into the folder, or say --allow-outside",
        )


def text_of(content: bytes) -> str:
    """Decode a caption; raises Refused where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            f"caption: not UTF-8 ({error.reason} at byte {error.start})", RECODE
        ) from None


RECODE = "write the text again as UTF-8 (iconv -f LATIN1 -t UTF-8)"
MOST_CAPTIONS = 64
"""Most captions of a picture: a batch has room for the most that any picture has."""


def is_missing(value: object) -> bool:
    """Return whether a cell is empty: None, or the NaN that tables of numbers hold there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def group_of(value: object) -> str:
    """Return the group of a cell, empty for none; raises Refused, and ValueError if not UTF-8."""
    if isinstance(value, (dict, list)):
        raise Refused("group: expected text or a number", "name another --group-column")
    text = "" if is_missing(value) else str(value)
    text.encode()
    return text


def clean_captions(captions: Sequence[object]) -> tuple[str, ...]:
    """Return the captions that are not empty; raises Refused for what is no text."""
    found = []
    for caption in captions:
        if is_missing(caption):
            continue
        if not isinstance(caption, str):
            raise Refused(
                f"caption: expected text, got {type(caption).__name__}",
                "name a column of text by --caption-column",
            )
        if not caption.isascii():
            try:
                caption.encode()
            except UnicodeEncodeError:
                raise Refused("caption: not UTF-8", RECODE) from None
        if caption.strip():
            found.append(caption.strip())
    if len(found) > MOST_CAPTIONS:
        raise Refused(
            f"expected at most {MOST_CAPTIONS} captions, got {len(found)}", "keep some of them"
        )
    return tuple(found)


SPLITS = {
    "train": "train",
    "training": "train",
    "val": "heldout",
    "valid": "heldout",
    "validation": "heldout",
    "dev": "heldout",
    "heldout": "heldout",
    "test": "test",
    "testing": "test",
    "tune": "tune",
}
"""What others call a split: our name of it, by which `m3i-fast evaluate` looks for it."""


def split_called(name: str) -> str | None:
    """Return the split that a folder or a word is called like, as Train, val2017 or test_1."""
    return SPLITS.get(name.strip().lower().rstrip("0123456789").rstrip("-_"))


def split_of_cell(name: str) -> str:
    """Return the split that a cell of a table names: one of ours, or that of its own name."""
    return SPLITS.get(name.strip().lower(), name.strip())


def split_in_name(name: str) -> str | None:
    """Return the split that a file's name says, or else the nearest folder's; None: none does.

    Words end at what is no letter, as in train-00000-of-00004.tar and val2017-000.tar; a name that
    says several splits says none.
    """
    for part in reversed(name.lower().split("/")):
        if found := {SPLITS[word] for word in re.split("[^a-z]+", part) if word in SPLITS}:
            return found.pop() if len(found) == 1 else None
    return None
