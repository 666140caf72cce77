"""`Batch`, which the data pipeline hands to training and evaluation.

Legend: B images, V global and L local views of each, S and s their sides in pixels, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Views of B images with their boxes, captions and labels; row b of each field is image b.

    A box is (y, x, height, width) in pixels of the upright image (EXIF applied) and flip (0 or 1):
    the view is that region, resized to S x S, THEN mirrored horizontally when flip = 1.

    A position counts the samples that all ranks of the run have taken before this one. All that is
    drawn for a sample is a function of it, and K neighbouring rows are the images of one input.
    """

    global_views: tuple[Tensor, ...]  # V x [B, 3, S, S] uint8, contiguous
    local_views: tuple[Tensor, ...]  # L x [B, 3, s, s] uint8, contiguous; may be empty
    boxes: Tensor  # [B, V + L, 5] float32, global views first
    image_size: Tensor  # [B, 2] float32: height, width of the upright image
    token_ids: Tensor  # [B, T] int32, zero padded
    num_tokens: Tensor  # [B] int64, 0 = no caption
    label: Tensor  # [B] int64, -1 = no label
    sample_id: Tensor  # [B] int64
    group_id: (
        Tensor  # [B] int64, shared by near duplicates: the sample_id of the group's first sample
    )
    position: Tensor  # [B] int64, of each sample in the run, ascending; always on the CPU
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Named columns, a tensor each: a class [B] int64, -1 for none; labels [B, M] int64, -1 after
    the last one and all -2 where they are not known; numbers [B, K] float32, NaN where one is not
    known; a text [B, T] int32, -1 after its last token id and all -1 for none; regions
    [B, V + L, R, 36] int32, those of each view, taken apart by `annotations.regions.Regions.of`."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Tokens that frozen encoders gave of the global views beforehand, by `Term.target_encoder`:
    [B, N, C] each. Encoders that are not here run in the step."""

    @property
    def batch_size(self) -> int:
        """Number B of images."""
        return self.sample_id.shape[0]

    @property
    def num_local(self) -> int:
        """Number L of local views of each image."""
        return len(self.local_views)

    def tensors(self) -> list[Tensor]:
        """List all tensors: global views, local views, the other fields in their order."""
        return [
            *self.global_views,
            *self.local_views,
            self.boxes,
            self.image_size,
            self.token_ids,
            self.num_tokens,
            self.label,
            self.sample_id,
            self.group_id,
            self.position,
            *self.columns.values(),
            *self.features.values(),
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to `device` without waiting; tensors already there are not copied.

        Positions stay on the CPU, where a step's draws are made.
        """
        target = torch.device(device)

        def moved(tensor: Tensor) -> Tensor:
            return copy_to_device(tensor, target)

        return Batch(
            global_views=tuple(map(moved, self.global_views)),
            local_views=tuple(map(moved, self.local_views)),
            boxes=moved(self.boxes),
            image_size=moved(self.image_size),
            token_ids=moved(self.token_ids),
            num_tokens=moved(self.num_tokens),
            label=moved(self.label),
            sample_id=moved(self.sample_id),
            group_id=moved(self.group_id),
            position=self.position,
            columns={name: moved(values) for name, values in self.columns.items()},
            features={name: moved(tokens) for name, tokens in self.features.items()},
        )


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`, itself where it is there, without waiting for the copy.

    What goes to a GPU goes through pinned memory, which torch's allocator reuses once the copy is
    done: of pageable memory CUDA makes a copy of its own first, and the host waits for that.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.contiguous().pin_memory()  # an expanded tensor has no memory to pin
    return tensor.to(device, non_blocking=True)
