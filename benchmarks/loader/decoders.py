"""Decoding alone, from memory: what no loader on this processor is faster than."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

from m3i_fast.benchmarks.loader.work import decode_pillow, decode_torchvision

Decode = Callable[[], object]  # decodes all pictures once, and keeps nothing


class DecodeAlone:
    """A loader that decodes pictures in memory again and again, and keeps nothing."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode

    def __iter__(self) -> Iterator[list[Tensor]]:
        return self

    def __next__(self) -> list[Tensor]:
        self._decode()
        return []


def in_threads(decode: Callable[[bytes], object]) -> Callable[[Sequence[bytes], int], Decode]:
    """Return a decoder of one picture as one of many, each by a thread of a pool."""

    def make(encoded: Sequence[bytes], num_threads: int) -> Decode:
        pool = ThreadPoolExecutor(num_threads)

        def discard(one: bytes) -> None:
            decode(one)

        def decode_all() -> None:
            for _ in pool.map(discard, encoded):
                pass

        return decode_all

    return make


def dali(encoded: Sequence[bytes], num_threads: int) -> Decode:
    """Decode by DALI's CPU decoder, in its threads."""
    from nvidia.dali import fn, pipeline_def, types

    pictures = [np.frombuffer(one, dtype=np.uint8) for one in encoded]

    @pipeline_def
    def graph() -> Any:
        data = fn.external_source(lambda: pictures, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(data, output_type=types.RGB, jpeg_fancy_upsampling=True)

    pipeline = graph(batch_size=len(pictures), num_threads=num_threads, prefetch_queue_depth=1)
    return lambda: pipeline.run()


def nvimagecodec(encoded: Sequence[bytes], num_threads: int) -> Decode:
    """Decode by nvImageCodec's CPU decoders, in its threads."""
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=num_threads,
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
    )
    pictures = list(encoded)
    return lambda: decoder.decode(pictures)


@dataclass(frozen=True, slots=True)
class Decoder:
    make: Callable[[Sequence[bytes], int], Decode]
    package: str

    @property
    def is_installed(self) -> bool:
        try:
            return find_spec(self.package) is not None
        except ModuleNotFoundError:  # the package that this one is in
            return False


DECODERS: dict[str, Decoder] = {
    "decode, Pillow": Decoder(in_threads(decode_pillow), "PIL"),
    "decode, torchvision": Decoder(in_threads(decode_torchvision), "torchvision"),
    "decode, DALI": Decoder(dali, "nvidia.dali"),
    "decode, nvImageCodec": Decoder(nvimagecodec, "nvidia.nvimgcodec"),
}
