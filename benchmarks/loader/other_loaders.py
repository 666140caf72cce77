"""What others load the same shards with: torch's DataLoader, webdataset and torchvision.

The work is that of our loader: read, a shuffle buffer of as many samples, decode once, cut every
view with its box, mirror, change colours as the recipe asks, and collate with captions and labels;
processes take the place of its threads. `torchvision, Pillow` is how torchvision is used mostly;
`torchvision, tensors` is its decoder and its transforms on uint8 tensors. Jitter turns hue in HSV,
ours in YIQ.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.manifest import read_manifest

PILLOW, TENSORS = "torchvision, Pillow", "torchvision, tensors"
SHUFFLE_BUFFER = 4096  # samples, of all processes
PREFETCH_FACTOR = 2  # batches ahead of each process, DataLoader's default


@dataclass(frozen=True)
class Views:
    """A sample's views and boxes; made where it is used, since processes are sent it."""

    configs: tuple[ViewConfig, ...]
    kind: str
    context_length: int

    def __call__(self, sample: dict[str, Any]) -> tuple[Any, ...]:
        """Return views of each config, boxes, image_size, token_ids, num_tokens, label and ids."""
        image, height, width = self._decode(sample.get("jpg") or sample["png"])
        made = [self._view(image, cfg) for cfg in self.configs for _ in range(cfg.count)]
        tokens = np.frombuffer(sample.get("tok", b""), dtype=np.int32)
        padded = np.zeros(self.context_length, dtype=np.int32)
        padded[: len(tokens)] = tokens[: self.context_length]
        numbers = (int(np.frombuffer(sample[name], dtype=np.int64)[0]) for name in _NUMBERS)
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
        for change in _photometric(cfg):
            view = change(view)
        if self.kind == PILLOW:
            view = functional.pil_to_tensor(view)
        return view, (top, left, height, width, float(flip))


_NUMBERS = ("cls", "sid", "gid")


def _photometric(cfg: ViewConfig) -> list[Any]:
    """Those that can act, as `pipelines.colour` has them."""
    from torchvision.transforms import v2

    samples: list[Any] = []
    if cfg.jitters:
        jitter = v2.ColorJitter(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
        samples.append(v2.RandomApply([jitter], cfg.jitter_probability))
    if cfg.gray_probability:
        samples.append(v2.RandomGrayscale(cfg.gray_probability))
    if cfg.blur_probability:
        window = 2 * math.ceil(3 * cfg.blur_sigma[1]) + 1
        blur = v2.GaussianBlur(window, cfg.blur_sigma)
        samples.append(v2.RandomApply([blur], cfg.blur_probability))
    if cfg.solarize_probability:
        samples.append(v2.RandomSolarize(128, cfg.solarize_probability))
    return samples


def peer(cfg: LoaderConfig, kind: str) -> Iterator[list[Tensor]]:
    """Yield batches without end: global views, local views, then the rest.

    ValueError where there are fewer shards than processes, which read whole ones.
    """
    import webdataset
    from torch.utils.data import DataLoader

    manifest = read_manifest(cfg.path)
    shards = [str(cfg.path / shard.file) for shard in manifest.split(cfg.split).shards]
    if len(shards) < cfg.num_threads:
        raise ValueError(
            f"data.num_threads: expected at most {len(shards)}, the shards of {cfg.split}, since a "
            f"process reads whole ones; got {cfg.num_threads}"
        )
    configs = (cfg.global_views, *([cfg.local_views] if cfg.local_views is not None else []))
    views = Views(configs, kind, manifest.tokenizer.context_length)
    samples = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=cfg.seed)
        .repeat()
        .shuffle(max(SHUFFLE_BUFFER // cfg.num_threads, 1))
        .map(views)
    )
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_size=cfg.batch_size,
        num_workers=cfg.num_threads,
        prefetch_factor=PREFETCH_FACTOR,
        multiprocessing_context=_processes(),
        drop_last=True,
    )
    return iter(loader)


def _processes() -> ForkServerContext:
    """Forks of a process without threads: our loader has some, which a fork of this one breaks."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torchvision.transforms.v2", "webdataset", __name__])
    return context


# ---- Decoding alone ------------------------------------------------------------------------------


def decode_pillow(encoded: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(encoded)).convert("RGB")


def decode_torchvision(encoded: bytes) -> Tensor:  # [3, H, W] uint8
    from torchvision.io import ImageReadMode, decode_image

    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    image: Tensor = decode_image(data, mode=ImageReadMode.RGB)
    return image


DECODERS: dict[str, Callable[[bytes], object]] = {
    "decode, Pillow": decode_pillow,
    "decode, torchvision": decode_torchvision,
}


def read_encoded(cfg: LoaderConfig, count: int) -> list[bytes]:
    """Return the first pictures of the split as they are stored; all of them if fewer."""
    import webdataset

    manifest = read_manifest(cfg.path)
    shards = [str(cfg.path / shard.file) for shard in manifest.split(cfg.split).shards]
    pictures: list[bytes] = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        pictures.append(sample.get("jpg") or sample["png"])
        if len(pictures) == count:
            break
    return pictures


class DecodeAlone:
    """A loader that decodes pictures in memory again and again, and keeps nothing."""

    def __init__(
        self, encoded: Sequence[bytes], decode: Callable[[bytes], object], num_threads: int
    ) -> None:
        self._encoded, self._decode = encoded, decode
        self._pool = ThreadPoolExecutor(num_threads)

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self

    def __next__(self) -> list[Tensor]:
        for _ in self._pool.map(self._discard, self._encoded):
            pass
        return []

    def _discard(self, encoded: bytes) -> None:
        self._decode(encoded)

    def close(self) -> None:
        self._pool.shutdown()
