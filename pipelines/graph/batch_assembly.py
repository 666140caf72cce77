"""The conversion of a graph's outputs to a `Batch`, checked and with one caption a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset import captions
from m3i_fast.pipelines.dataset.diagnosis import pipeline_error, sample_error
from m3i_fast.pipelines.dataset.manifest import Manifest, SplitInfo

if TYPE_CHECKING:
    from m3i_fast.pipelines.graph.dali import Pipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The split that is read, and the GPU of its batches (device_id None: the CPU)."""

    path: Path
    split: SplitInfo
    manifest: Manifest
    max_pixels: int
    device_id: int | None


def run(pipeline: Pipeline, origin: Origin) -> tuple[Tensor, ...]:
    """Run one iteration; returns tensors that own DALI's buffers, without a copy.

    Images, boxes and image sizes are on the origin's device, the rest on the CPU. Raises
    RuntimeError naming the sample that cannot be decoded.
    """
    device_id = origin.device_id
    try:
        if device_id is None:
            return tuple(torch.from_dlpack(o.as_tensor()) for o in pipeline.run())
        outputs = pipeline.run(torch.cuda.current_stream(device_id))
        with torch.cuda.device(device_id):
            return tuple(torch.from_dlpack(o.as_tensor()) for o in outputs)
    except RuntimeError as error:
        raise pipeline_error(
            origin.path, origin.split, origin.manifest, origin.max_pixels, error
        ) from error


def to_batch(
    tensors: tuple[Tensor, ...],
    num_global: int,
    origin: Origin,
    key: int | None,
    position: Tensor,  # [B] int64
) -> Batch:
    """Make a `Batch` of the outputs of a graph, which are in the graph's order.

    Of several captions the first is used, or with a key one drawn by key and sample. Raises
    RuntimeError naming a sample whose captions do not fit their lengths, or whose token ids, label,
    sample id or group id are out of range.
    """
    *head, token_ids, num_tokens, label, sample_id, group_id = tensors
    lengths = head.pop() if origin.split.max_captions > 1 else None
    *views, boxes, image_size = head
    tokenizer, num_classes = origin.manifest.tokenizer, len(origin.manifest.class_names)
    bad = captions.faulty_rows(token_ids, num_tokens, lengths, tokenizer)
    bad |= (label < -1) | (label >= num_classes) | (sample_id < 0) | (group_id < 0)
    if bad.any():
        raise sample_error(
            origin.path, origin.split, origin.manifest, int(sample_id[bad.nonzero()[0, 0]])
        )
    if lengths is not None:
        token_ids, num_tokens = captions.choose(
            token_ids,
            num_tokens,
            lengths,
            sample_id,
            context_length=tokenizer.context_length,
            key=key,
        )
    batch = Batch(
        global_views=tuple(views[:num_global]),
        local_views=tuple(views[num_global:]),
        boxes=boxes,
        image_size=image_size,
        token_ids=token_ids,
        num_tokens=num_tokens,
        label=label,
        sample_id=sample_id,
        group_id=group_id,
        position=position,
    )
    device_id = origin.device_id
    return batch if device_id is None else batch.to(torch.device("cuda", device_id))
