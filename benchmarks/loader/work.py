"""The work that every peer does, and the stored samples that it does it with.

A sample is read, decoded once, cut into views with their boxes, mirrored, recoloured as the recipe
asks, and collated with captions, labels and ids.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_fast.benchmarks.core.torchvision_views import colour_transforms
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.manifest import INDEXED, read_manifest
from m3i_fast.pipelines.dataset.pictures import FORMATS

PILLOW, TENSORS = "Pillow", "tensors"
NUMBERS = ("cls", "sid", "gid")  # label, sample id and group id: an int64 each
KEPT = ("tok", *NUMBERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a loader is asked for, whoever made it."""

    shards: tuple[Path, ...]
    views: tuple[ViewConfig, ...]  # global, then local ones
    context_length: int
    batch_size: int
    num_threads: int  # or processes
    prefetch: int  # batches
    seed: int
    shuffle_buffer: int  # samples, of those that cannot shuffle a whole epoch
    device_id: int | None  # GPU that decodes, of those that can
    address: str | None = None  # http URL of the shards where they are read from a bucket

    @classmethod
    def of(cls, cfg: LoaderConfig, *, shuffle_buffer: int, device_id: int | None) -> Work:
        """Return the work that our loader does with this config.

        Raises ValueError for tars that others wrote, which do not hold labels and ids.
        """
        manifest = read_manifest(cfg.path)
        if INDEXED in manifest.settings:
            raise ValueError(
                f"--data.path: expected shards of `m3i-fast data pack`, whose labels, ids and "
                f"captions every peer can read, got an index of other tars in {cfg.path}"
            )
        return cls(
            shards=tuple(cfg.path / shard.file for shard in manifest.split(cfg.split).shards),
            views=(cfg.global_views, *([cfg.local_views] if cfg.local_views is not None else [])),
            context_length=manifest.tokenizer.context_length,
            batch_size=cfg.batch_size,
            num_threads=cfg.num_threads,
            prefetch=cfg.prefetch,
            seed=cfg.seed,
            shuffle_buffer=shuffle_buffer,
            device_id=device_id,
        )


class StoredSamples(Sequence[dict[str, bytes]]):
    """The samples of tars by number, each read where it is asked for.

    Places are found by the standard library's tarfile, whatever index stands beside a shard.
    address: http URL of the shards, from which a sample is read by one request; None: from files.
    """

    def __init__(self, shards: Sequence[Path], address: str | None = None) -> None:
        self.shards, self._address = tuple(shards), address
        self._store: Any = None  # of this process
        self._files: dict[int, int] = {}  # open files of this process, by shard
        self._pid = 0
        places: dict[tuple[int, str], list[tuple[str, int, int]]] = {}
        for number, shard in enumerate(self.shards):
            with tarfile.open(shard) as tar:
                for member in tar:
                    key, _, extension = member.name.rpartition(".")
                    if extension in (*FORMATS, *KEPT):
                        found = places.setdefault((number, key), [])
                        found.append((extension, member.offset_data, member.size))
        self._places = [(shard, found) for (shard, _), found in places.items()]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        shard, found = self._places[index]
        if self._address is not None:
            return self._from_bucket(self._address, self.shards[shard].name, found)
        file = self._file(shard)
        return {extension: os.pread(file, size, offset) for extension, offset, size in found}

    def _from_bucket(
        self, address: str, name: str, found: list[tuple[str, int, int]]
    ) -> dict[str, bytes]:
        import obstore
        from obstore.store import HTTPStore

        if self._store is None:
            options: Any = {"allow_http": True}
            self._store = HTTPStore.from_url(address, client_options=options)
        begin = min(offset for _, offset, _ in found)
        end = max(offset + size for _, offset, size in found)
        content = bytes(obstore.get_range(self._store, name, start=begin, end=end))
        return {
            extension: content[offset - begin : offset - begin + size]
            for extension, offset, size in found
        }

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_pid": 0, "_store": None}

    def encoded(self, count: int) -> list[bytes]:
        """Return the first pictures as they are stored; all of them if fewer."""
        return [picture_of(self[i]) for i in range(min(count, len(self)))]


def picture_of(sample: dict[str, bytes]) -> bytes:
    """Return the encoded picture of a stored sample."""
    return next(sample[name] for name in FORMATS if name in sample)


@dataclass(frozen=True)
class Views:
    """A stored sample's views by torchvision; made where it is used: processes are sent it.

    kind: `Pillow`, how torchvision is used mostly, or `tensors`, its decoder and its transforms on
    uint8 tensors.
    """

    configs: tuple[ViewConfig, ...]
    kind: str
    context_length: int

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        """Return views of each config, boxes, image_size, token_ids, num_tokens, label and ids."""
        image, height, width = self._decode(picture_of(sample))
        made = [self._view(image, cfg) for cfg in self.configs for _ in range(cfg.count)]
        tokens = np.frombuffer(sample.get("tok", b""), dtype=np.int32)
        padded = np.zeros(self.context_length, dtype=np.int32)
        padded[: len(tokens)] = tokens[: self.context_length]
        numbers = (int(np.frombuffer(sample[name], dtype=np.int64)[0]) for name in NUMBERS)
        boxes = torch.tensor([box for _, box in made])
        size = torch.tensor([float(height), float(width)])
        views = [view for view, _ in made]
        return (*views, boxes, size, torch.from_numpy(padded), len(tokens), *numbers)

    def _decode(self, encoded: bytes) -> tuple[Any, int, int]:
        if self.kind == PILLOW:
            image = decode_pillow(encoded)
            return image, image.height, image.width
        image = decode_torchvision(encoded)
        return image, image.shape[1], image.shape[2]

    def _view(self, image: Any, cfg: ViewConfig) -> tuple[Tensor, tuple[float, ...]]:
        from torchvision.transforms import InterpolationMode, v2
        from torchvision.transforms.v2 import functional

        mode = {"cubic": InterpolationMode.BICUBIC, "linear": InterpolationMode.BILINEAR}
        crop = v2.RandomResizedCrop(cfg.size, cfg.scale, cfg.ratio, mode[cfg.interpolation])
        at = crop.make_params([image])
        size = [cfg.size, cfg.size]
        top, left, height, width = (at[name] for name in ("top", "left", "height", "width"))
        view = functional.resized_crop(
            image, top, left, height, width, size, mode[cfg.interpolation], antialias=True
        )
        flip = bool(torch.rand(()) < cfg.flip_probability)
        if flip:
            view = functional.horizontal_flip(view)
        for change in colour_transforms(cfg):
            view = change(view)
        if self.kind == PILLOW:
            view = functional.pil_to_tensor(view)
        return view, (top, left, height, width, float(flip))


def decode_pillow(encoded: bytes) -> Any:
    """Decode to a Pillow image in RGB."""
    from PIL import Image

    return Image.open(io.BytesIO(encoded)).convert("RGB")


def decode_torchvision(encoded: bytes) -> Tensor:  # [3, H, W] uint8
    """Decode by torchvision to a tensor."""
    from torchvision.io import ImageReadMode, decode_image

    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    image: Tensor = decode_image(data, mode=ImageReadMode.RGB)
    return image
