"""Settings of full fine-tuning for classification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from m3i_fast.config.fields import COUNTS, Checked, Conflict, unmet
from m3i_fast.config.optim import OptimConfig

BATCH_OF_RATE = 256  # the batch size that a base learning rate is given for


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuningConfig(Checked):
    """Choose the schedule and the augmentation of labels; the defaults are MAE's of ViT-L.

    MAE (arXiv 2111.06377, table 9) after BEiT. Its published code has epochs = 100, base_lr = 5e-4
    and layer_decay = 0.65 for ViT-B. Stochastic depth is the encoder's: 0.1 for ViT-B, 0.2 for
    ViT-L there.
    """

    epochs: Annotated[int, COUNTS] = 50
    """Epochs over the training pictures (MAE: 100 for ViT-B, 50 for ViT-L and ViT-H)."""
    warmup_epochs: float = 5.0
    """Epochs in which the learning rate rises linearly."""
    base_lr: float = 1e-3
    """Peak learning rate of 256 pictures a batch; that of another batch size is in proportion."""
    final_lr: float = 1e-6
    """Learning rate at the last step, reached by half a cosine."""
    layer_decay: float = 0.75
    """Learning rate of a layer over that of the next; the head has the full one."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none on parameters of one dimension or less, tokens and positions."""
    label_smoothing: float = 0.1
    """Share of a target that is spread over all classes."""
    mixup: float = 0.8
    """Alpha of mixup's Beta distribution; 0: none. With cutmix, each is drawn for half of the
    batches."""
    cutmix: float = 1.0
    """Alpha of CutMix's Beta distribution; 0: none."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from unmet(
            self,
            warmup_epochs=(0 <= self.warmup_epochs <= self.epochs, f"0 to epochs = {self.epochs}"),
            base_lr=(self.base_lr > 0, "> 0"),
            final_lr=(self.final_lr >= 0, ">= 0"),
            layer_decay=(0 < self.layer_decay <= 1, "0 < decay <= 1"),
            weight_decay=(self.weight_decay >= 0, ">= 0"),
            label_smoothing=(0 <= self.label_smoothing < 1, "0 <= share < 1"),
            mixup=(self.mixup >= 0, ">= 0"),
            cutmix=(self.cutmix >= 0, ">= 0"),
        )

    @property
    def mixes(self) -> bool:
        """Return whether pictures are mixed, which needs timm and batches of an even size."""
        return self.mixup > 0 or self.cutmix > 0

    def optim(self, batch_size: int) -> OptimConfig:
        """Return the optimiser's settings for batches of that size: AdamW without clipping."""
        return OptimConfig(
            lr=self.base_lr * batch_size / BATCH_OF_RATE,
            final_lr=self.final_lr,
            warmup_fraction=self.warmup_epochs / self.epochs,
            weight_decay=self.weight_decay,
            final_weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            layer_decay=self.layer_decay,
            clip_grad_norm=0.0,
        )
