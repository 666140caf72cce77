"""Shards read one component at a time, without DALI: to verify them and to name a bad sample."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from m3i_fast.pipelines.manifest import ShardInfo


class Member(NamedTuple):
    """One component of one sample."""

    name: str  # of the file in the tar
    content: bytes


def members(
    path: Path, shard: ShardInfo, extensions: Collection[str]
) -> Iterator[dict[str, Member]]:
    """{extension: member} of every sample of a shard in order, by its index; the others unread."""
    rows = (path / shard.index_file).read_text().splitlines()[1:]
    with (path / shard.file).open("rb") as file:
        for row in rows:
            found = {}
            parts = row.split(" ")
            for extension, offset, size, name in zip(*(parts[i::4] for i in range(4)), strict=True):
                if extension in extensions:
                    file.seek(int(offset))
                    found[extension] = Member(name, file.read(int(size)))
            yield found
