"""Full fine-tuning of an image encoder for classification, as BEiT and MAE do it.

Settings: arXiv 2111.06377, table 9, in `FineTuningConfig`. The classifier reads the mean of the
patch tokens through a LayerNorm, as MAE's and BEiT's do; the encoder's own final norm stays before
it, where theirs is taken out. Pictures and labels are mixed by timm's Mixup, a draw a batch; the
random augmentation of pictures (RandAugment there) is the batches' matter. Without an EMA.

It is part of the engine, and not of m3i_fast/evaluation, since it trains with the engine's
optimiser, parameter groups and schedules. Legend: B pictures, K classes, M validation pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from m3i_fast.config.fine_tuning import FineTuningConfig
from m3i_fast.engine.optim.optimizers import build_optimizer, set_schedules
from m3i_fast.engine.optim.schedules import lr_schedule
from m3i_fast.evaluation.batches import (
    Batches,
    expect_evaluable,
    expect_labels,
    labelled,
    repeated,
)
from m3i_fast.evaluation.probes.accuracy import top_k_hits
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.pipelines.optional_imports import require

HEAD_INIT_STD = 2e-5  # MAE's, so that the first gradients of the encoder are small
NORM_EPS = 1e-6

Mix = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Classifier(nn.Module):
    """An encoder, the mean of its patch tokens, a LayerNorm and a linear layer."""

    def __init__(self, encoder: ImageEncoder, num_classes: int, *, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.dim, eps=NORM_EPS)
        self.head = nn.Linear(encoder.dim, num_classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_INIT_STD, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] normalised -> [B, K] fp32
        """Classify pictures."""
        pooled = self.encoder.encode_cells(images).float().mean(1)
        logits: Tensor = self.head(self.norm(pooled)).float()
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuned:
    """A fine-tuned classifier and its accuracy after the last epoch."""

    classifier: Classifier  # in evaluation mode
    top1: float  # on the validation pictures
    top5: float
    logits: NDArray[np.float32]  # [M, K], labelled validation pictures in their order
    label: NDArray[np.int64]  # [M]
    loss: NDArray[np.float32]  # [steps]
    learning_rate: NDArray[np.float64]  # [steps], that of the head


def fine_tune(
    encoder: ImageEncoder,
    batches: Batches,
    validation: Batches,
    *,
    cfg: FineTuningConfig,
    num_classes: int,
    steps_per_epoch: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> FineTuned:
    """Train a copy of the encoder with a classifier, and measure it on the validation pictures.

    encoder: a ViT, an InternImage with dense tokens, or a timm model (`engine.teacher.TimmEncoder`)
    whose stochastic depth is as it was built; all its parameters are trained. batches: normalised
    pictures; cfg.epochs * steps_per_epoch of them are trained on, epoch after epoch. batch_size:
    that of the learning rate. dtype: of the products, by autocast; weights and losses are fp32.
    The last epoch's weights are measured, none is chosen by its accuracy. One process trains. On a
    CPU the result depends on the arguments alone; torch's and NumPy's global generators, those of
    other GPUs too, are left as they were. Of the validation pictures the first batch is checked
    before the training, and those of label -1, which is none, are left out.

    Raises ValueError for uint8 pictures, an odd batch where pictures are mixed, a label outside
    0..num_classes - 1, and an encoder whose layers have no order; ImportError where pictures are
    mixed and timm is not installed.
    """
    mix = _mixing(cfg, num_classes, seed)
    expect_evaluable("validation", validation, num_classes)
    device_ids = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(device_ids):
        _seed(device, seed)  # of stochastic depth
        trained = copy.deepcopy(encoder).requires_grad_(True).to(device)
        classifier = Classifier(trained, num_classes, seed=seed).to(device).train()
        optim = cfg.optim(batch_size)
        optimizer = build_optimizer(optim, classifier)
        rates = lr_schedule(optim, cfg.epochs * steps_per_epoch)
        losses = torch.zeros(len(rates), device=device)
        for step, (images, label) in enumerate(repeated(batches, len(rates))):
            _expect_normalised(images)
            expect_labels(label, num_classes)
            set_schedules(optimizer, lr=float(rates[step]), weight_decay=optim.weight_decay)
            mixed, target = mix(images.to(device), label.to(device), step)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = classifier(mixed)
            loss = F.cross_entropy(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
    classifier.eval()
    logits, label = _predict(classifier, validation, num_classes, device, dtype)
    top1, top5 = (float(top_k_hits(logits, label, k=k).double().mean()) for k in (1, 5))
    return FineTuned(
        classifier=classifier,
        top1=top1,
        top5=top5,
        logits=logits.numpy(),
        label=label.numpy(),
        loss=losses.cpu().numpy(),
        learning_rate=rates,
    )


def _mixing(cfg: FineTuningConfig, num_classes: int, seed: int) -> Mix:
    """Return a function of pictures, labels and the step: mixed pictures, targets [B, K] fp32.

    What is drawn depends on (seed, step) alone.
    """
    if not cfg.mixes:
        return lambda images, label, step: (images, _smoothed(label, num_classes, cfg))
    mixup = require("timm.data", extra="timm").Mixup(
        mixup_alpha=cfg.mixup,
        cutmix_alpha=cfg.cutmix,
        label_smoothing=cfg.label_smoothing,
        num_classes=num_classes,
    )

    def mix(images: Tensor, label: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if len(images) % 2:
            raise ValueError(
                f"batches: expected an even number of pictures, which mixup pairs, got "
                f"{len(images)}; leave out the last batch of an epoch, or set mixup and cutmix to 0"
            )
        with _numpy_seed(seed, step):
            mixed, target = mixup(images.clone(), label)  # it changes its input in place
        return mixed, target

    return mix


def _smoothed(label: Tensor, num_classes: int, cfg: FineTuningConfig) -> Tensor:  # [B] -> [B, K]
    hard = F.one_hot(label, num_classes).float()
    return torch.lerp(hard, torch.full_like(hard, 1 / num_classes), cfg.label_smoothing)


@contextmanager
def _numpy_seed(*key: int) -> Iterator[None]:
    """Seed NumPy's global generator, which timm's Mixup draws from, and put it back afterwards."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(key).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(before)


def _seed(device: torch.device, seed: int) -> None:
    """Seed the generators of the CPU and of one device; torch.manual_seed seeds all GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@torch.no_grad()
def _predict(
    classifier: Classifier,
    validation: Batches,
    num_classes: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [M, K] fp32, [M] int64, on the CPU
    logits, labels = [], []
    for batch in validation(0):
        images, label = labelled(batch, num_classes)
        _expect_normalised(images)
        if not len(label):
            continue
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits.append(classifier(images.to(device)).float().cpu())
        labels.append(label.cpu())
    if not labels:
        raise ValueError("validation: expected labelled pictures, got none")
    return torch.cat(logits), torch.cat(labels)


def _expect_normalised(images: Tensor) -> None:
    if not images.is_floating_point() or images.ndim != 4:
        raise ValueError(
            "batches: expected normalised pictures [B, 3, S, S] of floats, got "
            f"{list(images.shape)} {images.dtype}"
        )
