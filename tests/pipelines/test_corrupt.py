"""A sample that cannot be decoded is named."""

from __future__ import annotations

import json

import pytest

from m3i_fast.pipelines.loader import Loader, LoaderConfig, evaluation_batches
from tests.pipelines.data import (
    EVERYTHING,
    Packer,
    encode_image,
    sample,
    smooth_picture,
)


@pytest.mark.parametrize("kind", ["truncated", "header", "garbage", "empty"])
def test_a_corrupt_sample_is_named(packer: Packer, kind: str) -> None:
    jpeg = encode_image(smooth_picture(0, 200, 200), "JPEG", quality=98)
    bad = {
        "truncated": jpeg[: len(jpeg) // 2],
        "header": jpeg[:200],
        "garbage": b"\x00garbage" * (len(jpeg) // 8),
        "empty": b"",
    }[kind]
    # The packer refuses such a sample, so the bytes are damaged behind its back.
    path = packer([sample(i, jpeg) for i in range(8)])
    index = path / "train-000000.idx"
    rows = index.read_text().splitlines()
    row = next(i for i, text in enumerate(rows) if "000000003-picture-3.jpg" in text)
    parts = rows[row].split(" ")
    with (path / "train-000000.tar").open("r+b") as file:
        file.seek(int(parts[1]))
        file.write(bad)
    parts[2] = str(len(bad))
    rows[row] = " ".join(parts)
    index.write_text("\n".join(rows) + "\n")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["index_bytes"] = index.stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    loader = Loader(LoaderConfig(path=path, batch_size=8, global_views=EVERYTHING))
    message = "corrupt sample .*000000003-picture-3.jpg.*m3i-fast data verify"
    with pytest.raises(RuntimeError, match=message):
        next(loader)
    with pytest.raises(RuntimeError, match=message):
        list(evaluation_batches(path, "train", image_size=8, batch_size=8))
