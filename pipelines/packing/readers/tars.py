"""WebDataset tars, such as img2dataset's: a picture with txt, json or cls of the same name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

from m3i_fast.durable_files import UnpacksToTooMuch, expect_unpacked
from m3i_fast.pipelines.packing.items import (
    UNKNOWN,
    Item,
    Listing,
    Place,
    Refused,
    SourceOptions,
    Stamp,
    changed,
    check_files,
    check_num_bytes,
    clean_captions,
    group_of,
    printable,
    split_in_name,
    text_of,
)
from m3i_fast.pipelines.packing.readers.folders import PICTURE_SUFFIXES
from m3i_fast.pipelines.packing.readers.labels import assign_labels
from m3i_fast.pipelines.packing.readers.named_columns import assign_columns, specs_of
from m3i_fast.pipelines.packing.readers.spool import (
    NAME,
    Spool,
    open_spool,
    read_range,
    read_spooled,
)
from m3i_fast.pipelines.tar_members import NAME as MEMBER_NAME
from m3i_fast.pipelines.tar_members import Range, Stream, whole_tar_members

MAX_TEXT_BYTES = 1 << 20
PICTURES = frozenset(suffix[1:] for suffix in PICTURE_SUFFIXES)
PLAIN = (".tar",)
OPENED_BY: dict[str, Callable[[Path], Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
COMPRESSED = tuple(OPENED_BY)
MOST_TAR_BYTES = 1 << 60  # of a compressed one, whose size nothing says
_COPY = "copy the tar again from where it came"
DAMAGE = (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError)


class Part(NamedTuple):
    """A file of a sample: its place, and its content where that is text."""

    place: Place
    content: bytes
    fault: Refused | None = None


def tar_files(path: Path) -> list[Path]:
    """Return the tar, or all tars below a folder in the order of their names."""
    if path.is_file():
        return [path]
    found = (p for p in path.rglob("*") if p.name.lower().endswith(PLAIN + COMPRESSED))
    return sorted(p for p in found if not p.is_dir())


class Tars:
    """Reader of the pictures in tars."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.folder = options.path.parent if options.path.is_file() else options.path

    def list(self) -> Listing:
        listing = Listing()
        labels: list[object] = []
        specs, named = specs_of(self.options.columns), dict[str, dict[str, Any]]()
        files = check_files(tar_files(self.options.path), self.options, listing)
        splits = _splits(files, listing)
        stamps = {name: listing.files[name] for name in files if _opener(name) is not None}
        with open_spool(self.options, stamps) if stamps else nullcontext() as spool:
            for name, file in files.items():
                seen: set[str] = set()
                for key, parts in self._samples(
                    file, name, listing, spool if name in stamps else None
                ):
                    where = printable(f"{name}:{key}")
                    with listing.row(where):
                        if key in seen:
                            raise Refused("a name twice in one tar", "write the tar again")
                        seen.add(key)
                        item, label, facts = self._item(where, parts)
                        listing.items.append(item._replace(split=splits[name]))
                        labels.append(label)
                        row = {of: facts.get(of) for spec in specs for of in spec.sources}
                        named[item.name] = {s.name: s.of_row(row) for s in specs}
        caption = " and ".join(f"json:{name}" for name in self.options.json_captions)
        listing.notes.append(
            f"captions: {caption or 'txt, or else json:caption'} (--json-caption); label: "
            f"{self.options.label_column or 'cls'} (--label-column); group: "
            f"{self.options.group_column or 'none'} (--group-column)"
        )
        assign_labels(
            listing,
            labels,
            class_names=self.options.class_names,
            label_as=self.options.label_as,
        )
        assign_columns(listing, self.options, named)
        return listing

    def read(self, place: Place, listed: Stamp = UNKNOWN) -> bytes:
        if place[0] == NAME:
            return read_spooled(self.options, place)
        name, start, size, header = place
        file = self.folder / str(name)
        found = read_range(file, int(start) - BLOCKSIZE, BLOCKSIZE + int(size))
        if zlib.crc32(found[:BLOCKSIZE]) != header:
            raise changed(file, f"without the picture that was listed at byte {start}")
        return found[BLOCKSIZE:]

    def _samples(
        self, file: Path, name: str, listing: Listing, spool: Spool | None
    ) -> Iterator[tuple[str, dict[str, Part]]]:
        """Yield (key, parts by extension) of neighbouring files of one key."""
        key, parts, last = "", dict[str, Part](), "its start"
        try:
            for member, header, read in _members(file, name, listing, self.options):
                match = MEMBER_NAME.fullmatch(member.name)
                if match is None:
                    listing.refuse(
                        printable(f"{name}:{member.name}"),
                        "expected a name with an extension",
                        "name it KEY.EXTENSION",
                    )
                    continue
                if match[1] != key:
                    if parts:
                        yield key, parts
                    key, parts = match[1], {}
                extension = match[2].lower()
                try:
                    if extension in parts:
                        raise Refused(f"{extension} twice", "write the tar again")
                    parts[extension] = self._part(member, header, read, extension, name, spool)
                except Refused as refused:
                    parts[extension] = Part((), b"", refused)
                last = member.name
        except UnpacksToTooMuch:
            raise
        except DAMAGE as error:
            reason = f"damaged after {printable(last)}: {printable(str(error))}"
            listing.refuse(printable(name), reason, _COPY)
            if parts:
                where = printable(f"{name}:{key}")
                listing.refuse(where, f"may lack files: its tar is {reason}", _COPY)
        else:
            if parts:
                yield key, parts

    def _part(
        self,
        member: tarfile.TarInfo,
        header: int,
        read: Callable[[], bytes],
        extension: str,
        name: str,
        spool: Spool | None,
    ) -> Part:
        place: Place = (name, member.offset_data, member.size, header)
        if extension in PICTURES or extension == self.options.image_column:
            check_num_bytes(member.size)
            return Part(spool.append(read()) if spool else place, b"")
        if extension not in ("txt", "json", "cls"):
            return Part(place, b"")
        if member.size > MAX_TEXT_BYTES:
            raise Refused(
                f"expected at most {MAX_TEXT_BYTES} bytes of text, got {member.size}", "shorten it"
            )
        return Part(place, read())

    def _item(
        self, where: str, parts: dict[str, Part]
    ) -> tuple[Item, object, dict[str | None, Any]]:
        """Return the item of a sample, its label as it is stored, and the object of its json."""
        for part in parts.values():
            if part.fault is not None:
                raise part.fault
        asked = self.options.image_column
        pictures = [asked] if asked else [e for e in parts if e in PICTURES]
        if len(pictures) != 1 or pictures[0] not in parts:
            raise Refused(
                f"expected one picture, got {', '.join(map(printable, parts))}",
                "name its extension by --image-column where there are several",
            )
        facts = _json(parts)
        captions: list[object] = []
        if self.options.json_captions:
            captions = [facts.get(name) for name in self.options.json_captions]
        elif "txt" in parts:
            captions = [text_of(parts["txt"].content)]
        else:
            captions = [facts.get("caption")]
        flat = [c for value in captions for c in (value if isinstance(value, list) else [value])]
        group = facts.get(self.options.group_column) if self.options.group_column else None
        label: object = _label(parts)
        if self.options.label_column not in (None, "cls"):
            label = facts.get(self.options.label_column)
        if isinstance(label, (dict, list)):
            raise Refused("label: expected text or a number", "name another --label-column")
        place = parts[pictures[0]].place
        item = Item(
            where,
            place,
            captions=clean_captions(flat),
            group=group_of(group),
        )
        return item, label, facts


def _splits(names: Iterable[str], listing: Listing) -> dict[str, str]:
    """Return the split of each tar by its name, train where that holds none, and note them."""
    found = {name: split_in_name(name) for name in names}
    splits = {name: split or "train" for name, split in found.items()}
    if any(found.values()):
        counts = ", ".join(f"{n} of {split}" for split, n in Counter(splits.values()).items())
        listing.notes.append(f"splits are in the names of tars: {counts} (--split)")
    return splits


def _json(parts: dict[str, Part]) -> dict[str | None, Any]:
    if "json" not in parts:
        return {}
    try:
        facts = json.loads(text_of(parts["json"].content))
    except (ValueError, RecursionError) as error:
        reason = error.reason if isinstance(error, Refused) else f"json: {error}"
        raise Refused(reason, "mend or remove the json") from None
    if not isinstance(facts, dict):
        raise Refused("json: expected an object", "mend or remove the json")
    return facts


def _label(parts: dict[str, Part]) -> str | int:
    """Return the label of cls: text, or the int64 of this package's shards, which have sid too."""
    content = parts["cls"].content if "cls" in parts else b""
    if len(content) == 8 and "sid" in parts:
        return int.from_bytes(content, "little", signed=True)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Refused(f"cls: expected text, got {content[:20]!r}", "mend the label") from None


def _opener(name: str) -> Callable[[Path], Any] | None:
    """Return what opens a compressed tar; None: it is not called like one."""
    return next((of for end, of in OPENED_BY.items() if name.lower().endswith(end)), None)


def _members(
    file: Path, name: str, listing: Listing, options: SourceOptions
) -> Iterator[tuple[tarfile.TarInfo, int, Callable[[], bytes]]]:
    """Yield the files in a tar, the CRC-32 of their headers (0: compressed), and what reads them.

    Links and devices are refused. Raises one of DAMAGE where the tar is damaged or cut off, and
    UnpacksToTooMuch.
    """
    opener = _opener(name)
    with file.open("rb") if opener is None else opener(file) as opened:
        if opener is None:
            size = file.stat().st_size
            source: Range | Stream = Range(partial(os.pread, opened.fileno()), 0, size)
        else:  # the size that is told by the end alone is checked there
            expect = partial(expect_unpacked, file, most_gib=options.max_unpacked_gib)
            size, source = MOST_TAR_BYTES, Stream(opened, expect)
        for member, end in whole_tar_members(source, size):
            if opener is not None:
                expect(end)
            if member.isdir():
                continue
            if not member.isreg():
                where = printable(f"{name}:{member.name}")
                listing.refuse(where, "a link or a device", "store the file itself")
                continue
            header = 0
            if opener is None:
                block = os.pread(opened.fileno(), BLOCKSIZE, member.offset_data - BLOCKSIZE)
                header = zlib.crc32(block)
            yield member, header, partial(_content, opened, member)


def _content(opened: Any, member: tarfile.TarInfo) -> bytes:
    opened.seek(member.offset_data)
    content = bytes(opened.read(member.size))
    if len(content) < member.size:
        raise EOFError(f"cut off in {member.name}")
    return content
