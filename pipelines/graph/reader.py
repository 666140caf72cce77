"""The DALI graphs, which turn shards into decoded images and these into a `Batch`'s tensors.

One graph for training and one for evaluation, on a GPU ("mixed" decoding) or wholly on the CPU.
The order of samples and the state of a checkpoint are API: changing either is a breaking change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from m3i_fast.config.data import ViewConfig
from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.captions import LENGTHS, PADDING, TOKENS
from m3i_fast.pipelines.graph.dali import DataNode, dali_math, fn, pipeline_def, types
from m3i_fast.pipelines.graph.views import centre_view, random_views

READER_NAME = "reader"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffle:
    """Shuffling: tars are reordered every epoch, equally on all ranks, and samples in a buffer."""

    seed: int  # the same on every rank, so that ranks read different samples
    initial_fill: int  # samples in the buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The shards of one split, as one rank reads them."""

    paths: tuple[str, ...]
    index_paths: tuple[str, ...]
    shard_id: int
    num_shards: int
    context_length: int
    max_captions: int  # most captions of one picture
    max_alternates: int  # most other pictures of one sample; 0: none is read
    on_gpu: bool
    shuffle: Shuffle | None
    hw_decoder_load: float | None = None  # share of JPEGs for a GPU's decoder; None: DALI's default


@dataclass(frozen=True, slots=True)
class Record:
    """The nodes of one decoded sample."""

    image: DataNode  # [H, W, 3] uint8 upright, on the GPU where there is one
    size_hw: DataNode  # [2] int64 upright height and width
    image_size: DataNode  # [2] float32, the same
    # On the CPU, where captions are checked and chosen: their lengths where a picture can have
    # several, token_ids, num_tokens, label, sample_id, group_id.
    annotations: tuple[DataNode, ...]
    # An alternate picture and its size_hw, where alternates are read.
    other: tuple[DataNode, DataNode] | None = None


def read(source: Source) -> Record:
    """Read a sample, decode it once, and pad its captions; a missing one has 0 tokens.

    Where a picture can have several captions their lengths, padded with -1, are read as well. Where
    none has more than one the graph does not read them, so that checkpoints from before captions
    had lengths still resume.
    """
    several, has_alternates = source.max_captions > 1, source.max_alternates > 0
    encoded, tokens, *others = fn.readers.webdataset(
        name=READER_NAME,
        paths=list(source.paths),
        index_paths=list(source.index_paths),
        ext=["jpg;png", TOKENS, "cls", "sid", "gid"]
        + [LENGTHS] * several
        + [alternates.PICTURES, alternates.SIZES] * has_alternates,
        dtypes=[types.UINT8, types.INT32, *[types.INT64] * 3]
        + [types.INT32] * several
        + [types.UINT8, types.INT32] * has_alternates,
        missing_component_behavior="empty",
        shard_id=source.shard_id,
        num_shards=source.num_shards,
        # Padding gives every rank the same number of batches an epoch; the padded ones are dropped.
        pad_last_batch=True,
        **(_shuffling(source.shuffle) if source.shuffle else {}),
    )
    other = None
    if has_alternates:
        *others, pictures, sizes = others
        other = _decode(_one_of(pictures, sizes, source.max_alternates), source)
    image, size_hw = _decode(encoded, source)
    num_tokens = tokens.shape(dtype=types.INT64)[0]
    most_tokens = source.max_captions * source.context_length
    padded = fn.pad(tokens, axes=[0], shape=[most_tokens], fill_value=0)
    image_size = fn.cast(size_hw, dtype=types.FLOAT)
    lengths = [
        fn.pad(node, axes=[0], shape=[source.max_captions], fill_value=PADDING)
        for node in others[3:]
    ]
    scalars = (fn.reshape(node, shape=[]) for node in others[:3])
    return Record(
        image=image,
        size_hw=size_hw,
        image_size=image_size,
        annotations=(*lengths, padded, num_tokens, *scalars),
        other=other,
    )


def _decode(encoded: DataNode, source: Source) -> tuple[DataNode, DataNode]:
    """Decode a picture: ([H, W, 3] uint8 upright, [2] int64 height and width)."""
    size_hw = fn.peek_image_shape(encoded)[:2]
    image = fn.decoders.image(
        encoded,
        device="mixed" if source.on_gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        **_decoding(source.hw_decoder_load),
    )
    return image, size_hw


def _one_of(pictures: DataNode, sizes: DataNode, most: int) -> DataNode:
    """Draw one of a sample's alternates, still encoded, each with equal probability.

    pictures: [N] uint8, the encoded pictures joined. sizes: [n] int32 bytes of each, n <= `most`.
    """
    number = fn.cast(sizes.shape()[0], dtype=types.FLOAT)
    chosen = dali_math.floor(fn.random.uniform(range=[0.0, 1.0]) * number)  # a cast would round
    chosen = fn.cast(dali_math.min(chosen, number - 1.0), dtype=types.INT32)  # the product can too
    padded = fn.pad(sizes, axes=[0], shape=[most], fill_value=0)
    place = types.Constant(np.arange(most, dtype=np.int32))
    sums = [
        fn.reductions.sum(padded * fn.cast(kept, dtype=types.INT32))
        for kept in (place < chosen, place == chosen)
    ]
    start, size = (fn.reshape(fn.cast(s, dtype=types.INT32), shape=[1]) for s in sums)
    return fn.slice(pictures, start=start, shape=size, axes=[0])


def _decoding(hw_decoder_load: float | None) -> dict[str, float]:
    """Return the decoder's load argument; left out by default, so that old checkpoints resume."""
    return {} if hw_decoder_load is None else {"hw_decoder_load": hw_decoder_load}


def _shuffling(shuffle: Shuffle) -> dict[str, Any]:
    return {
        "random_shuffle": True,
        "initial_fill": shuffle.initial_fill,
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": shuffle.seed,
    }


def _outputs(
    record: Record, views: list[DataNode], boxes: list[DataNode], on_gpu: bool
) -> tuple[DataNode, ...]:
    """Return views, boxes and image_size on the views' device, then the annotations."""
    small = (fn.stack(*boxes), record.image_size)
    return (*views, *(node.gpu() if on_gpu else node for node in small), *record.annotations)


@pipeline_def(enable_checkpointing=True)
def training_graph(
    source: Source, global_views: ViewConfig, local_views: ViewConfig | None
) -> tuple[DataNode, ...]:
    """Build the graph of training: global views, local views, boxes, image_size, annotations."""
    record = read(source)
    views, boxes = random_views(record.image, record.size_hw, global_views, record.other)
    if local_views is not None:
        local, local_boxes = random_views(record.image, record.size_hw, local_views)
        views, boxes = views + local, boxes + local_boxes
    return _outputs(record, views, boxes, source.on_gpu)


@pipeline_def
def evaluation_graph(source: Source, image_size: int) -> tuple[DataNode, ...]:
    """Build the graph of evaluation, whose only view is the centre square."""
    record = read(source)
    view, box = centre_view(record.image, record.size_hw, image_size)
    return _outputs(record, [view], [box], source.on_gpu)
