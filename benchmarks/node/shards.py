"""The shards that `bench node` reads: the user's, or pictures made for this one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.pipelines.dataset.manifest import Manifest, is_dataset, is_free, quoted
from m3i_fast.pipelines.sources import synthetic

PLACE = Path("synthetic")  # what a row says of shards that are gone
EPOCH_BATCHES = 2  # of all ranks; the same pictures come again
_FIRST_MERGE = 514  # ids of bytes, start and end


@contextmanager
def shards_of(
    cfg: TrainConfig, *, make: bool, world: World, num_pictures: int = 0
) -> Iterator[TrainConfig]:
    """Give the config with data that exist; make: in a temporary folder, removed at the end.

    num_pictures: to be made; 0: as many as EPOCH_BATCHES of all ranks have.
    Classes, vocabulary and terms are those of the data, as in training. Raises FileNotFoundError
    where there are no shards and none are to be made, and as `take_data_fields`.
    """
    if not make:
        path = cfg.data.path
        if not is_dataset(path):
            place = quoted(path) if is_free(path) else "NEW_DIRECTORY"
            raise FileNotFoundError(
                f"--data.path: no shards at {path}: name others, make pictures with "
                f"m3i-fast data synthetic {place}, or add --synthetic-data, which makes some for "
                "this run alone"
            )
        yield take_data_fields(cfg)
        return
    with shared_folder(world) as folder:
        path = folder / "shards"
        if world.is_main:
            text = cfg.text
            synthetic.build(
                path,
                num_samples=num_pictures or EPOCH_BATCHES * cfg.data.batch_size * world.size,
                num_merges=max(text.vocab_size - _FIRST_MERGE, 0),
                context_length=text.context_length,
            )
        world.wait_for_all()
        yield take_data_fields(replace(cfg, data=replace(cfg.data, path=path, split="train")))


def describe(manifest: Manifest, split: str) -> dict[str, Any]:
    """Return what a row says of the pictures."""
    shards = manifest.split(split)
    size = sum(shard.num_bytes for shard in shards.shards)
    return {
        "name": manifest.name,
        "num_pictures": shards.num_samples,
        "smallest_hw": list(manifest.min_image_size),
        "largest_hw": list(manifest.max_image_size),
        "format": manifest.image_format,
        "shard_bytes_per_picture": size / shards.num_samples,
        "settings": manifest.settings,
    }


@contextmanager
def shared_folder(world: World) -> Iterator[Path]:
    """Give a temporary folder of the first rank, which all see; it is removed at the end."""
    if not world.is_main:
        yield Path(world.gather("")[0])
        world.wait_for_all()
        return
    with TemporaryDirectory(prefix="m3i-node-") as name:
        world.gather(name)
        yield Path(name)
        world.wait_for_all()
