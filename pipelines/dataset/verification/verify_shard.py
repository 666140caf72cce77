"""Verification of one shard by the rows of its table: every byte is read once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.files import Advance, OpenFile
from m3i_fast.pipelines.dataset.manifest import TOKENS_MEMBER, Manifest, ShardInfo
from m3i_fast.pipelines.dataset.pictures import FORMATS, check_header
from m3i_fast.pipelines.dataset.sample_table import BAD, NO_CRC, Rows, checksum
from m3i_fast.pipelines.dataset.tar_shards import INTEGERS, Member
from m3i_fast.pipelines.dataset.verification.diagnosis import picture_fault
from m3i_fast.pipelines.tar_members import sample_files

PIECE_BYTES = 1 << 22
COLUMNS = ("label", "sample_id", "group_id")  # of the table, as INTEGERS are in a tar


class Fault(NamedTuple):
    """Something that differs from what it should be."""

    where: str  # file or split
    sample: str | None  # id and, where its header can be read, key; None: not one sample
    reason: str  # with the file, what was expected and got

    def __str__(self) -> str:
        """Return the reason."""
        return self.reason


class Counted(NamedTuple):
    """What the counts of a split need of a sample."""

    num_captions: int
    num_alternates: int
    label: int
    group_id: int


@dataclass(slots=True)
class ShardReport:
    """A shard, how closely it is looked at, and what was found."""

    file: str  # path or URL
    shard: ShardInfo
    manifest: Manifest
    max_pixels: int
    decode: bool
    max_alternates: int
    advance: Advance  # told the bytes that are read
    faults: list[Fault] = field(default_factory=list)
    num_bad: int = 0

    def add(self, sample: str | None, reason: str) -> None:
        """Record a fault of a sample, or of the shard itself."""
        self.faults.append(Fault(self.shard.file, sample, f"{self.file}: {reason}"))


class _Hashed:
    """A tar that is read from its beginning on, and hashed."""

    def __init__(self, tar: OpenFile, advance: Advance) -> None:
        self._tar, self._advance = tar, advance
        self.place, self.sha256 = 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Read on; fewer bytes where the tar ends."""
        content = self._tar.pread(size, self.place)
        self.sha256.update(content)
        self.place += len(content)
        self._advance(len(content))
        return content

    def skip(self, end: int) -> None:
        """Read up to a byte for the digest alone."""
        while (left := end - self.place) > 0:
            if not self.read(min(left, PIECE_BYTES)):
                break


def read_shard(report: ShardReport, tar: OpenFile, rows: Rows) -> Iterator[Counted]:
    """Read a shard, and yield what was counted of each sample that is good.

    Faults are recorded in the report: of the sample whose bytes differ from its checksum, of one
    whose bytes are right but not usable, and of the bytes between and after samples.
    """
    hashed = _Hashed(tar, report.advance)
    for row in rows[np.argsort(rows["offset"], kind="stable")]:
        start, size = int(row["offset"]), int(row["size"])
        name = str(int(row["sample_id"]))
        if start < hashed.place or start % 512 or start + size > report.shard.num_bytes:
            expected = f"expected bytes from {hashed.place} on (table)"
            report.add(name, f"sample {name}: {expected}, got {size} at {start}")
            continue
        hashed.skip(start)
        counted = _check_sample(report, row, hashed.read(size), name)
        if counted is not None:
            yield counted
    hashed.skip(report.shard.num_bytes)
    got = hashed.sha256.hexdigest()
    if got != report.shard.sha256:
        where = "" if report.faults else " (bytes between or after samples)"
        report.add(None, f"expected sha256 {report.shard.sha256}, got {got}{where}")


def _check_sample(report: ShardReport, row: np.void, content: bytes, name: str) -> Counted | None:
    """Check the bytes of a sample and then what they say; None where it has a fault or is bad."""
    if not row["flags"] & NO_CRC and checksum(content) != row["crc32c"]:
        got = f"expected CRC-32C {row['crc32c']:08x}, got {checksum(content):08x}"
        report.add(name, f"sample {name} ({_key_of(content)}): damaged: {got}")
        return None
    try:
        key, files = sample_files(content)
        if row["flags"] & BAD:
            report.num_bad += 1
            return None
        return _check_files(report, row, key, files)
    except ValueError as error:
        report.add(name, f"sample {name}: {error}")
        return None


def _key_of(content: bytes) -> str:
    """Return the name in the first header of a sample, which may be damaged."""
    return content[:100].split(b"\0")[0].decode("utf-8", "backslashreplace").partition(".")[0]


def _check_files(
    report: ShardReport, row: np.void, key: str, files: Mapping[str, bytes]
) -> Counted:
    """Check the files of a sample; raises ValueError naming one, expected and got."""
    manifest = report.manifest
    pictures = [extension for extension in files if extension in FORMATS]
    if len(pictures) != 1:
        got = ", ".join(files)
        raise ValueError(f"{key}: expected one image ({', '.join(FORMATS)}), got {got}")
    image = files[pictures[0]]
    try:
        check_header(lambda at, count: image[at : at + count], None, report.max_pixels)
    except ValueError as error:
        raise ValueError(f"{key}.{pictures[0]} ({error})") from error
    alternates.check_stored(key, files, most=report.max_alternates, max_pixels=report.max_pixels)
    members = {e: Member(f"{key}.{e}", content) for e, content in files.items()}
    fault = picture_fault(members, report.max_pixels) if report.decode else None
    if fault is not None:
        raise ValueError(fault)
    if manifest.caption_member == TOKENS_MEMBER:
        _check_packed(row, key, files, manifest)
    if not -1 <= row["label"] < len(manifest.class_names):
        expected = f"a label from -1 to {len(manifest.class_names) - 1}"
        raise ValueError(f"{key}: expected {expected} (table), got {row['label']}")
    num_bytes = {extension: len(content) for extension, content in files.items()}
    return Counted(
        _num_captions(files, manifest),
        alternates.count(num_bytes),
        int(row["label"]),
        int(row["group_id"]),
    )


def _check_packed(row: np.void, key: str, files: Mapping[str, bytes], manifest: Manifest) -> None:
    """Check the token ids of a sample, and its numbers by those in the table."""
    tokens, lengths = files.get(captions.TOKENS), files.get(captions.LENGTHS)
    fault = captions.stored_fault(tokens, lengths, manifest.tokenizer)
    if fault is not None:
        extension = captions.TOKENS if tokens is not None else captions.LENGTHS
        raise ValueError(f"{key}.{extension} ({fault})")
    for column, extension in zip(COLUMNS, INTEGERS, strict=True):
        stored = files.get(extension)
        if stored is not None and len(stored) != 8:
            raise ValueError(f"{key}.{extension} (expected 8 bytes, got {len(stored)})")
        if stored is not None and (value := int(np.frombuffer(stored, "<i8")[0])) != row[column]:
            raise ValueError(f"{key}.{extension} (expected {row[column]} (table), got {value})")


def _num_captions(files: Mapping[str, bytes], manifest: Manifest) -> int:
    """Count the captions of a sample; raises ValueError where their text cannot be read."""
    kind, _, name = manifest.caption_member.partition(":")
    if kind == TOKENS_MEMBER:
        return captions.count({extension: len(content) for extension, content in files.items()})
    text = files.get(kind, b"").decode()
    if text and name:
        fields = json.loads(text)
        value = fields.get(name) if isinstance(fields, dict) else None
        if not isinstance(value, str | None):
            raise ValueError(f"{kind}: {name}: expected text, got {value!r}")
        text = value or ""
    return int(bool(text.strip()))
