"""Show on a GPU what our use of DALI relies on: batches that stay as they are, and the CPU's crops.

    python dali_check.py cuda|cpu

`Loader` hands out tensors that share DALI's buffers, without a copy and without `record_stream`.
So each check looks for a buffer that is used again too early:

- held: batches that are kept while the pipeline runs on, past all that it prefetches;
- poisoned: batches that are overwritten once they are ours, beside a second loader's;
- dropped: batches that a kernel still reads, on another stream, when Python has freed them.

And the centre squares and random crops of the device are compared with the CPU's and with Pillow's,
and its crops of the same pictures in large and in small batches with each other: with
`data.exact_decode` they are equal, without it two decoders share a batch.
Prints `check ` and JSON for each, as scripts/gpu/reading.py reads it; exits with 1 where one fails.
docs/start/first_hour.md says what each of them is for.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader, evaluation_batches

BATCH, IMAGE, SIZE_HW, NUM_SAMPLES = 16, 96, (200, 260), 96
PREFETCH = 3
BATCHES = 4 * PREFETCH  # more than the pipeline can have ahead
SMALLER = 4  # times, the batches in which the same pictures are decoded again
POISON = 0xAA
CYCLES = 50_000_000  # a kernel that waits so many clocks: tens of milliseconds
# Levels of 0 to 255 that two decoders and resizers may differ by: in the mean, and in all but a
# thousandth of the pixels.
MEAN_LEVELS, MOST_LEVELS = 1.0, 8.0


def tell(what: str, expected: str, got: str, holds: bool) -> bool:
    """Print a check and return whether it holds."""
    check = {"what": what, "expected": expected, "got": got, "holds": holds}
    print(f"check {json.dumps(check | {'source': 'docs/start/first_hour.md'})}", flush=True)
    return holds


def config(path: Path) -> LoaderConfig:
    """Return a small loader with random crops and without a change of colours."""
    plain = ViewConfig(size=IMAGE, jitter_probability=0.0, gray_probability=0.0)
    return LoaderConfig(path=path, batch_size=BATCH, global_views=plain, prefetch=PREFETCH)


# ---- Buffers -------------------------------------------------------------------------------------


def differing(first: Batch, second: Batch) -> int:
    """Return the number of tensors of two batches that are not equal bit for bit."""
    pairs = zip(first.tensors(), second.tensors(), strict=True)
    return sum(not torch.equal(a, b) for a, b in pairs)


def copy_of(batch: Batch) -> Batch:
    """Return a batch with memory of its own, on the CPU, once the device has made it."""

    def copied(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(copied, value))
        if isinstance(value, dict):
            return {name: copied(values) for name, values in value.items()}
        return value.cpu() if value.is_cuda else value.clone()

    return Batch(**{name: copied(getattr(batch, name)) for name in batch.__slots__})


def overwritten_while_held(batches: Iterator[Batch], number: int = BATCHES) -> int:
    """Return how many tensors of held batches changed while later ones were made."""
    held = []
    for _ in range(number):
        batch = next(batches)
        held.append((batch, copy_of(batch)))
    return sum(differing(copy_of(batch), as_it_came) for batch, as_it_came in held)


def spoilt_by_poison(batches: Iterator[Batch], others: Iterator[Batch]) -> int:
    """Return how many tensors differ from another loader's where those of before were overwritten.

    Both loaders give the same batches; of the first each batch is filled once it has been read.
    """
    wrong = 0
    for _ in range(BATCHES):
        batch, other = next(batches), next(others)
        wrong += differing(copy_of(batch), copy_of(other))
        for tensor in batch.tensors():
            tensor.fill_(1 if tensor.dtype.is_floating_point else POISON % 128)
    return wrong


def spoilt_after_drop(batches: Iterator[Batch], others: Iterator[Batch], device: str) -> int:
    """Return how many views differ that a late kernel read after Python had freed the batch.

    Each batch is taken and read on a side stream behind a kernel that waits, and dropped at once.
    """
    stream = torch.cuda.Stream() if device == "cuda" else None
    read, expected = [], []
    for _ in range(BATCHES):
        expected.append(copy_of(next(others)).global_views[0])
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            batch = next(batches)
            if stream is not None:
                torch.cuda._sleep(CYCLES)
            read.append(batch.global_views[0].clone())
            del batch
    if stream is not None:
        stream.synchronize()
    pairs = zip(read, expected, strict=True)
    return sum(not torch.equal(late.cpu(), as_made) for late, as_made in pairs)


# ---- Pictures ------------------------------------------------------------------------------------


def levels_apart(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean difference of two uint8 tensors and the one that 0.1% exceed, in levels."""
    difference = (first.cpu().int() - second.cpu().int()).abs().flatten().float()
    rank = max(1, int(0.999 * difference.numel()))
    return difference.mean().item(), difference.kthvalue(rank).values.item()


def tell_levels(what: str, first: Tensor, second: Tensor) -> bool:
    """Tell how far two sets of pictures are apart."""
    mean, most = levels_apart(first, second)
    expected = f"mean up to {MEAN_LEVELS:g} levels, 99.9% within {MOST_LEVELS:g}"
    holds = mean <= MEAN_LEVELS and most <= MOST_LEVELS
    return tell(what, expected, f"mean {mean:.3f}, 99.9% within {most:g}", holds)


def squares_by_pillow(path: Path, ids: list[int]) -> Tensor:  # [N, 3, IMAGE, IMAGE] uint8
    """Return the centre squares of samples as Pillow decodes, crops and resizes them."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    pictures: dict[int, bytes] = {}
    for shard in sorted(path.rglob("*.tar")):
        with tarfile.open(shard) as archive:
            files: dict[str, dict[str, bytes]] = {}
            for member in archive:
                key, _, extension = member.name.partition(".")
                content = archive.extractfile(member)
                assert content is not None
                files.setdefault(key, {})[extension] = content.read()
        for parts in files.values():
            number = int(np.frombuffer(parts["sid"], dtype=np.int64)[0])
            pictures[number] = parts["jpg"]
    squares = []
    for number in ids:
        with Image.open(io.BytesIO(pictures[number])) as opened:
            side = min(opened.size)
            left, top = (opened.width - side) // 2, (opened.height - side) // 2
            box = (left, top, left + side, top + side)
            square = opened.resize((IMAGE, IMAGE), Image.Resampling.BICUBIC, box=box)
        squares.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    return torch.stack(squares)


# ---- All of it -----------------------------------------------------------------------------------


def check_buffers(path: Path, device: str) -> Iterator[bool]:
    """Tell of each use of a buffer whether it comes too early."""
    device_id = 0 if device == "cuda" else None

    def loader() -> Iterator[Batch]:
        return Loader(config(path), device_id=device_id)

    ahead = f"{BATCHES} batches, {PREFETCH} ahead"
    for what, count in {
        f"batches held while the pipeline runs on ({ahead})": overwritten_while_held(loader()),
        f"batches after earlier ones were overwritten ({ahead})": spoilt_by_poison(
            loader(), loader()
        ),
        f"views that a late kernel reads of freed batches ({ahead})": spoilt_after_drop(
            loader(), loader(), device
        ),
    }.items():
        yield tell(what, "0 tensors changed", f"{count} tensors changed", count == 0)


def check_pictures(path: Path, device: str) -> Iterator[bool]:
    """Tell how far the device's pictures are from the CPU's and Pillow's."""
    device_id = 0 if device == "cuda" else None
    options: dict[str, Any] = {"image_size": IMAGE, "batch_size": BATCH}
    ours = next(evaluation_batches(path, "train", device_id=device_id, **options))
    theirs = next(evaluation_batches(path, "train", device_id=None, **options))
    views = ours.global_views[0]
    yield tell_levels(f"centre squares, {device} beside the CPU", views, theirs.global_views[0])
    pillows = squares_by_pillow(path, theirs.sample_id.tolist())
    yield tell_levels(f"centre squares, {device} beside Pillow", views, pillows)
    cropped = next(Loader(config(path), device_id=device_id))
    on_cpu = next(Loader(config(path), device_id=None))
    same = torch.equal(cropped.boxes.cpu(), on_cpu.boxes)
    yield tell(f"boxes of random crops, {device} beside the CPU", "equal",
               "equal" if same else "they differ", same)  # fmt: skip
    views, expected = cropped.global_views[0], on_cpu.global_views[0]
    yield tell_levels(f"random crops, {device} beside the CPU", views, expected)


def crops_in_batches(
    path: Path, device_id: int | None, batch_size: int, exact: bool
) -> Tensor:  # [NUM_SAMPLES, 3, IMAGE, IMAGE] uint8
    """Return the crops of an epoch in batches of a size, in the order of the samples."""
    cfg = replace(config(path), batch_size=batch_size, exact_decode=exact)
    loader = Loader(cfg, device_id=device_id)
    crops = [next(loader).global_views[0].cpu() for _ in range(NUM_SAMPLES // batch_size)]
    loader.close()
    return torch.cat(crops)


def check_batches(path: Path, device: str) -> Iterator[bool]:
    """Tell whether a picture's pixels depend on the batch that it is decoded in."""
    device_id = 0 if device == "cuda" else None
    sizes = BATCH, BATCH // SMALLER
    what = f"pictures decoded in batches of {sizes[0]} and of {sizes[1]}"
    exact = [crops_in_batches(path, device_id, size, exact=True) for size in sizes]
    differ = int((exact[0] != exact[1]).flatten(1).any(1).sum())
    yield tell(f"{what}, data.exact_decode", "0 differ", f"{differ} differ", differ == 0)
    shared = [crops_in_batches(path, device_id, size, exact=False) for size in sizes]
    yield tell_levels(f"{what}, by both decoders", *shared)


def main() -> None:
    """Print the checks of a device."""
    from m3i_fast.pipelines.sources import synthetic

    device = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic.build(
            Path(folder) / "data", num_samples=NUM_SAMPLES, size_hw=SIZE_HW, num_merges=100
        )
        held = [
            *check_buffers(path, device),
            *check_pictures(path, device),
            *check_batches(path, device),
        ]
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
