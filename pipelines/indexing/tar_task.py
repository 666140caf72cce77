"""The index of one tar: a task that any process can do, and that is done once.

Its result is a file, beside which nothing is kept: a start that finds it goes on after it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from m3i_fast.durable_files import write_atomically
from m3i_fast.pipelines.dataset.files import LocalFile
from m3i_fast.pipelines.dataset.sample_table import BAD, ROW, Rows, checksum
from m3i_fast.pipelines.indexing.contents import Columns, Facts, read_facts
from m3i_fast.pipelines.indexing.scan import Found, scan
from m3i_fast.pipelines.indexing.tar_places import Tar

PIECE_BYTES = 1 << 22
READ = ("jpg", "jpeg", "png", "webp", "txt", "json", "cls")


@dataclass(frozen=True, kw_only=True, slots=True)
class TarTask:
    """A tar to index, and where its result goes."""

    tar: Tar
    result: Path
    columns: Columns

    @property
    def identity(self) -> str:
        """Digest of the settings and of the tar's stamp: a result of another is old."""
        key = [self.tar.name, *self.tar.stamp(), asdict(self.columns)]
        return hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()


@dataclass(kw_only=True, slots=True)
class TarIndex:
    """What was found in a tar."""

    name: str
    num_bytes: int = 0
    sha256: str = ""
    # sample_id is the number of the row, and group_id the hash of the group or -1.
    rows: Rows = field(default_factory=lambda: np.zeros(0, ROW))
    num_captions: int = 0
    class_names: dict[str, list[int]] = field(default_factory=dict)  # rows of each name
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)  # least and most height, least and most width
    refused: list[dict[str, Any]] = field(default_factory=list)
    # of each row, where named columns are asked for; read again by `read_named` alone
    named: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, key: str | None, reason: str, **more: object) -> None:
        """Record a sample, or with None the tar itself, that cannot be used."""
        self.refused.append({"file": self.name, "sample": key, "reason": reason, **more})


def run(task: TarTask) -> Path:
    """Index a tar, write the result and return its file."""
    with task.tar.local(task.result.parent) as file:
        index = index_tar(file, task.tar.name, task.columns)
    summary = {
        name: getattr(index, name)
        for name in TarIndex.__dataclass_fields__
        if name not in ("rows", "named")
    }
    content = index.rows.tobytes() + json.dumps(index.named).encode()
    head = {
        "identity": task.identity,
        "num_rows": len(index.rows),
        "num_bytes_of_result": len(content),
        **summary,
    }
    write_atomically(task.result, json.dumps(head).encode() + b"\n" + content)
    return task.result


def read_result(task: TarTask) -> TarIndex | None:
    """Read the result of a task; None where there is no whole one of this tar and settings."""
    try:
        head, _, content = task.result.read_bytes().partition(b"\n")
        summary = json.loads(head)
        is_whole = summary.pop("num_bytes_of_result") == len(content)
        if not is_whole or summary.pop("identity") != task.identity:
            return None
        rows = np.frombuffer(content, ROW, summary.pop("num_rows")).copy()
        summary["formats"] = Counter(summary["formats"])
        return TarIndex(**summary, rows=rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_named(task: TarTask) -> list[dict[str, Any]]:
    """Read what a whole result says of the named columns of each row."""
    head, _, content = task.result.read_bytes().partition(b"\n")
    found: list[dict[str, Any]] = json.loads(content[json.loads(head)["num_rows"] * ROW.itemsize :])
    return found


def index_tar(file: Path, name: str, columns: Columns) -> TarIndex:
    """Read every byte of a tar once, and index the samples that can be used."""
    index = TarIndex(name=name, num_bytes=file.stat().st_size)
    opened = LocalFile(file)
    try:
        samples, fault = scan(opened, index.num_bytes)
    finally:
        opened.close()
    if fault is not None:
        index.refuse(None, fault)
    rows: list[tuple[int, ...]] = []
    digest = hashlib.sha256()
    with file.open("rb") as tar:
        for found in samples:
            _skip(tar, digest, found.start)
            if found.fault is not None:
                index.refuse(found.key, found.fault)
                continue
            content = tar.read(found.end - found.start)
            digest.update(content)
            try:
                facts = read_facts(dict(_files(found, content)), columns)
            except ValueError as error:
                index.refuse(found.key, str(error))
                continue
            _count(index, facts, found.key, len(rows))
            rows.append(_row(found, facts, checksum(content), len(rows)))
            if columns.named:  # of a picture that is not taken nothing is known
                index.named.append({} if facts.fault_of_pixels else facts.named)
        _skip(tar, digest, index.num_bytes)
    index.sha256 = digest.hexdigest()
    index.rows = np.array(rows, ROW)
    return index


def _skip(tar: BinaryIO, digest: Any, end: int) -> None:
    """Read up to a byte for the digest alone."""
    while (left := end - tar.tell()) > 0:
        piece = tar.read(min(left, PIECE_BYTES))
        if not piece:
            break
        digest.update(piece)


def _files(found: Found, content: bytes) -> Iterator[tuple[str, bytes]]:
    for extension, offset, size in found.parts:
        at = offset - found.start
        yield extension, content[at : at + size] if extension in READ else b""


def _row(found: Found, facts: Facts, crc: int, number: int) -> tuple[int, ...]:
    label = -1 if isinstance(facts.label, str) else facts.label
    flags = BAD if facts.fault_of_pixels else 0
    size = found.end - found.start
    return (found.start, number, facts.group, size, 0, crc, label, flags, 0)


def _count(index: TarIndex, facts: Facts, key: str, number: int) -> None:
    if facts.fault_of_pixels is not None:
        index.refuse(key, facts.fault_of_pixels, flagged=True)
        return
    index.num_captions += bool(facts.caption)
    index.formats[facts.image_format] += 1
    if isinstance(facts.label, str):
        index.class_names.setdefault(facts.label, []).append(number)
    low, high = facts.height, facts.height
    left, right = facts.width, facts.width
    if index.sizes:
        low, high = min(low, index.sizes[0]), max(high, index.sizes[1])
        left, right = min(left, index.sizes[2]), max(right, index.sizes[3])
    index.sizes = [low, high, left, right]
