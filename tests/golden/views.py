"""The part of samples: order, boxes and pixels that each backend of the loader gives."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader
from tests.golden.differences import of_tensor
from tests.shared.pipelines.data import (
    EVERYTHING,
    pack,
    sample,
    several_captions,
    smooth_picture,
)

NUM_SAMPLES, BATCH_SIZE, NUM_PICTURES = 200, 20, 48


def samples() -> dict[str, Any]:
    """Return 200 samples of each backend, over four epochs, with two global and two local views."""
    with TemporaryDirectory() as folder:
        drawn = [
            sample(i, _picture(i), captions=several_captions(i), label=i % 4 - 1)
            for i in range(NUM_PICTURES)
        ]
        local = replace(EVERYTHING, size=8, count=2, scale=(0.05, 0.3))
        cfg = LoaderConfig(
            path=pack(Path(folder) / "data", drawn),
            batch_size=BATCH_SIZE,
            global_views=EVERYTHING,
            local_views=local,
            seed=5,
            num_threads=1,
        )
        return {name: _of_backend(replace(cfg, backend=name)) for name in ("dali", "torch")}


def _picture(index: int) -> bytes:
    """JPEG of several kinds, some turned by EXIF, and PNG."""
    picture = Image.fromarray(smooth_picture(index, 40 + 7 * (index % 9), 90 - 5 * (index % 11)))
    out, kind = io.BytesIO(), index % 6
    exif = picture.getexif()
    exif[0x0112] = 1 + index % 8
    if kind < 4:
        mode = "L" if kind == 3 else "RGB"
        picture.convert(mode).save(out, "JPEG", quality=90, exif=exif, progressive=kind == 1)
    else:
        picture.convert("RGB" if kind == 4 else "P").save(out, "PNG")
    return out.getvalue()


def _of_backend(cfg: LoaderConfig) -> dict[str, Any]:
    loader = Loader(cfg)
    batches = [next(loader) for _ in range(NUM_SAMPLES // BATCH_SIZE)]
    loader.close()
    return {
        "order": [int(each) for batch in batches for each in batch.sample_id],
        "pixels": [digest for batch in batches for digest in _pixels(batch)],
        "batches": [_numbers(batch) for batch in batches],
    }


def _pixels(batch: Batch) -> list[dict[str, str]]:
    """Return of each sample the digest of all its views."""
    views = [*batch.global_views, *batch.local_views]
    return [
        {
            "sha256": hashlib.sha256(
                b"".join(view[row].numpy().tobytes() for view in views)
            ).hexdigest()[:12]
        }
        for row in range(batch.batch_size)
    ]


def _numbers(batch: Batch) -> dict[str, Any]:
    """Return boxes and what else a batch has; of views also sums, for other machines."""
    found = {
        name: of_tensor(getattr(batch, name))
        for name in ("image_size", "token_ids", "num_tokens", "label", "group_id", "position")
    }
    boxes = [" ".join(f"{value:g}" for value in box) for box in batch.boxes.flatten(0, 1).tolist()]
    views = torch.cat([view.flatten() for view in (*batch.global_views, *batch.local_views)])
    return found | {"boxes": boxes, "box bits": of_tensor(batch.boxes), "views": of_tensor(views)}
