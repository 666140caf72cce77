"""Pictures, samples and small data sets for the pipeline's tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader, ViewConfig
from m3i_fast.pipelines.pack import DatasetInfo, write_dataset
from m3i_fast.pipelines.samples import Sample
from m3i_fast.pipelines.tokens import TokenizerInfo

TOKENIZER = TokenizerInfo(num_merges=7, context_length=12, vocab_size=521, fingerprint="f" * 64)


def encode_image(pixels: NDArray[np.uint8], image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def smooth_picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """[H, W, 3] soft colour noise, which JPEG and resampling treat kindly."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def sample(index: int, image: Any, **changes: Any) -> Sample:
    """A sample with a caption and a label that follow from its index."""
    fields: dict[str, Any] = {
        "image": image,
        "extension": "png" if image.startswith(b"\x89PNG") else "jpg",
        "name": f"picture-{index}",
        "sample_id": index,
        "group_id": index,
        "captions": (np.arange(1, 4 + index % 5, dtype=np.int32),),
        "label": index % 3,
    }
    return Sample(**{**fields, **changes})


def several_captions(index: int) -> tuple[NDArray[np.int32], ...]:
    """0 to 3 captions of 2 to 6 ids, no two alike: the second id says which one it is."""
    return tuple(
        np.array([index + 1, *range(100 * k, 100 * k + 1 + (index + k) % 5)], dtype=np.int32)
        for k in range(1, 1 + index % 4)
    )


def info(**changes: Any) -> DatasetInfo:
    fields: dict[str, Any] = {
        "name": "test",
        "class_names": ("a", "b", "c"),
        "tokenizer": TOKENIZER,
        "licence": "none",
        "attribution": "nobody",
        "settings": {},
    }
    return DatasetInfo(**{**fields, **changes})


def pack(out: Path, samples: Sequence[Sample], samples_per_shard: int = 4) -> Path:
    return write_dataset(
        out, {"train": samples}, info(), seed=0, samples_per_shard=samples_per_shard
    )


Packer = Callable[[Sequence[Sample]], Path]


EVERYTHING = ViewConfig(size=16, blur_probability=0.5, solarize_probability=0.3)


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def take(loader: Loader, number: int) -> list[Batch]:
    return [next(loader) for _ in range(number)]
