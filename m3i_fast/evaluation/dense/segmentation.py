"""Linear segmentation: batch norm and a 1 x 1 convolution on frozen patch tokens.

It is DINOv2's linear ADE20k protocol (arXiv 2304.07193, section 7.4, and its published configs):
AdamW at 0.001 with weight decay 0.0001, 40,000 steps of 16 crops, a linear warm-up over the first
1,500 and then a straight line to 0; cross-entropy of the logits upsampled to the crop, bilinear
with align_corners False. Pixels labelled IGNORED count neither in the loss (its mean is over the
other pixels, where mmsegmentation divides by all) nor in a measure.

The resolution that is evaluated is that of the label map as it is stored: the picture is cut into
windows of the training crop's side that overlap by a third, their upsampled logits are averaged
where windows overlap, the average is upsampled to the label map, and then the likeliest class of
each pixel is taken. IoU is of the whole set: one confusion matrix is summed over all pictures.

Legend: B pictures, N tokens (a square grid), C width, K classes, S pixels of a window's side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.evaluation.batches import Batches, Encode, LabelledBatch, cell_tokens, repeated
from m3i_fast.evaluation.dense.patch_probe import mean_iou

IGNORED = 255  # label of a pixel that counts nowhere
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
NUM_STEPS = 40_000
BATCH_SIZE = 16
WARMUP_SHARE = 1500 / NUM_STEPS
WARMUP_START = 1e-6  # of the learning rate
INIT_STD = 0.01


class LinearSegmentation(nn.Module):
    """Frozen tokens to logits of classes: batch norm over all tokens, then a linear layer."""

    def __init__(self, dim: int, num_classes: int, *, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.classifier.weight, std=INIT_STD, generator=generator)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, N, C] -> [B, K, side, side] fp32
        """Classify every token; ValueError where they are no square grid."""
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(
                f"tokens: expected a square grid of them (square windows), got {tokens.shape[1]} a "
                "picture; num_prefix has to count class and register tokens"
            )
        logits: Tensor = self.classifier(self.norm(tokens.mT.unflatten(2, (side, side))))
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationScores:
    """What a confusion matrix says."""

    confusion: Tensor  # [K, K] int64, row: label, column: prediction
    iou: Tensor  # [K] fp64, NaN for a class that is neither labelled nor predicted
    mean_iou: float  # over the other classes
    pixel_accuracy: float


def train_segmentation(
    encode: Encode,
    batches: Batches,
    *,
    num_classes: int,
    num_prefix: int,
    num_steps: int = NUM_STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int,
    device: torch.device,
) -> tuple[LinearSegmentation, Tensor]:  # the head in evaluation mode, [steps] fp32 losses
    """Train the head on crops [B, 3, S, S] with label maps [B, S, S] int64, in fp32.

    encode: frozen; called without gradients. num_prefix: its class and register tokens. One process
    trains, whose batches are whole: of several ranks let the first one call this.

    Raises ValueError where a label is neither 0..num_classes - 1 nor IGNORED, num_classes is not
    in 1..IGNORED, tokens are no square grid, or a step has fewer than two of them.
    """
    if not 1 <= num_classes <= IGNORED:
        raise ValueError(f"num_classes: expected 1 to {IGNORED}, got {num_classes}")
    losses = torch.zeros(num_steps, device=device)
    head: LinearSegmentation | None = None
    for step, (pictures, labels) in enumerate(repeated(batches, num_steps)):
        _expect_map(labels, num_classes)
        with torch.no_grad():
            tokens = cell_tokens(encode, pictures.to(device), num_prefix)
        if head is None:
            head = LinearSegmentation(tokens.shape[-1], num_classes, seed=seed).to(device)
            optimizer = torch.optim.AdamW(
                head.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * lr_factor(step, num_steps)
        loss = segmentation_loss(head(tokens), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
    if head is None:
        raise ValueError(f"num_steps: expected one or more, got {num_steps}")
    return head.eval(), losses.cpu()


def lr_factor(step: int, num_steps: int) -> float:
    """Return the learning rate of a step over its peak: mmsegmentation's poly with power 1.

    1 - step / num_steps, and in the first WARMUP_SHARE of the steps times a line that rises from
    WARMUP_START to 1.
    """
    warmup = round(WARMUP_SHARE * num_steps)
    ramp = min(step / warmup, 1.0) if warmup else 1.0
    return (1 - step / num_steps) * (1 - (1 - ramp) * (1 - WARMUP_START))


def segmentation_loss(
    logits: Tensor,  # [B, K, side, side]
    labels: Tensor,  # [B, H, W] int64
) -> Tensor:  # []
    """Return the mean cross-entropy of all pixels but ignored ones; 0 where there are no others."""
    logits = upsample(logits, labels.shape[-2:])
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp_min(1)


def upsample(logits: Tensor, size: tuple[int, ...]) -> Tensor:  # [B, K, h, w] -> [B, K, *size]
    """Resize logits, bilinear with align_corners False."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def evaluate_segmentation(
    encode: Encode,
    head: LinearSegmentation,
    pictures: Iterable[LabelledBatch],
    *,
    num_classes: int,
    num_prefix: int,
    window: int,
    device: torch.device,
) -> Tensor:  # [K, K] int64 on the CPU, row: label, column: prediction
    """Count the pixels of each label and prediction, at the resolution of the label maps.

    pictures: [B, 3, h, w] with label maps [B, H, W] of any other size; both sides of a picture have
    `window` pixels or more. Confusion matrices of parts of the set add up, so that ranks may share
    the pictures and sum. Raises ValueError as `train_segmentation`.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for views, labels in pictures:
        _expect_map(labels, num_classes)
        logits = window_logits(encode, head, views.to(device), num_prefix, window)
        predicted = upsample(logits, labels.shape[-2:]).argmax(1)
        confusion += confusion_matrix(labels.to(device), predicted, num_classes)
    return confusion.cpu()


def window_logits(
    encode: Encode, head: LinearSegmentation, views: Tensor, num_prefix: int, window: int
) -> Tensor:  # [B, 3, h, w] -> [B, K, h, w]
    """Average the logits of overlapping square windows; ValueError for a side below `window`."""
    height, width = views.shape[-2:]
    if min(height, width) < window:
        raise ValueError(
            f"pictures: expected sides of at least {window} pixels (window), got {height} x {width}"
        )
    total: Tensor | None = None
    count = torch.zeros(height, width, device=views.device)
    for y in window_starts(height, window):
        for x in window_starts(width, window):
            part = (..., slice(y, y + window), slice(x, x + window))
            logits = upsample(head(cell_tokens(encode, views[part], num_prefix)), (window, window))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[part] += logits
            count[part] += 1
    assert total is not None
    return total / count


def window_starts(side: int, window: int) -> Iterator[int]:
    """Yield where windows start that cover a side, two thirds of a window apart (512: 341)."""
    stride = max(1, window * 2 // 3)
    for index in range(max(side - window + stride - 1, 0) // stride + 1):
        yield min(index * stride, side - window)


def confusion_matrix(
    labels: Tensor,  # int64, any shape
    predicted: Tensor,  # int64, the same shape
    num_classes: int,
) -> Tensor:  # [K, K] int64, row: label, column: prediction
    """Count the pixels of each label and prediction, without ignored ones."""
    counts = labels != IGNORED
    index = labels[counts] * num_classes + predicted[counts]
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def segmentation_scores(confusion: Tensor) -> SegmentationScores:  # [K, K] int64
    """Return the IoU of each class, its mean and the pixel accuracy of a summed confusion matrix.

    Raises ValueError where no pixel was counted.
    """
    if not confusion.any():
        raise ValueError("confusion: expected a pixel that is labelled, got none")
    both, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    either = (labelled + predicted - both).double()
    return SegmentationScores(
        confusion=confusion,
        iou=both / either.where(either > 0, math.nan),
        mean_iou=float(mean_iou(torch.stack([both, labelled, predicted]))),
        pixel_accuracy=float(both.sum() / confusion.sum()),
    )


def _expect_map(labels: Tensor, num_classes: int) -> None:
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_classes))]
    if len(wrong):
        raise ValueError(
            f"label map: expected 0 to {num_classes - 1} (num_classes = {num_classes}) or "
            f"{IGNORED} for pixels to ignore, got {int(wrong[0])}"
        )
