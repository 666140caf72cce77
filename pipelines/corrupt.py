"""Name the sample that stopped the pipeline. Only reached once decoding has failed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from m3i_fast.pipelines.manifest import ShardInfo, SplitInfo
from m3i_fast.pipelines.samples import PILLOW_FORMAT, decode_size

NAMED = re.compile(r"Failed to decode sample #\d+ : (?P<source>.+)")


def sample_error(path: Path, split: SplitInfo, error: RuntimeError) -> RuntimeError:
    """An error with the sample's name, or with DALI's text alone where no sample is bad.

    DALI names a sample whose pixels fail to decode but not one whose header cannot be parsed; for
    those the split is decoded again with Pillow until the first bad one.
    """
    match = NAMED.search(str(error))
    source = match["source"] if match else find_corrupt(path, split)
    if source is None:
        return RuntimeError(f"the data pipeline stopped: {error}")
    return RuntimeError(
        f"corrupt sample {source} in {path}; check the files with: m3i-fast data verify {path}"
    )


def find_corrupt(path: Path, split: SplitInfo) -> str | None:
    """shard:sample of the first image that Pillow cannot decode."""
    for shard in split.shards:
        for name, image in images(path, shard):
            try:
                decode_size(image)
            except Exception:  # Pillow raises a dozen types on corrupt data
                return f"{shard.file}:{name}"
    return None


def images(path: Path, shard: ShardInfo) -> Iterator[tuple[str, bytes]]:
    """(member name, encoded bytes) of every image of a shard, by its index."""
    rows = (path / shard.index_file).read_text().splitlines()[1:]
    with (path / shard.file).open("rb") as file:
        for row in rows:
            parts = row.split(" ")
            for extension, offset, size, name in zip(*(parts[i::4] for i in range(4)), strict=True):
                if extension in PILLOW_FORMAT:
                    file.seek(int(offset))
                    yield name, file.read(int(size))
