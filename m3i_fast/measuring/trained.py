"""Measures that train on the labelled rows: linear sweep, attentive probe and fine-tuning.

Pictures are those of the encoder's own transform, in an order drawn by (seed, epoch): none of the
random crops and colours with which papers train their classifiers. One process trains.

Legend: B pictures, S side in pixels, n measured labelled rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_fast.config.fine_tuning import FineTuningConfig
from m3i_fast.engine.fine_tuning import fine_tune
from m3i_fast.evaluation.batches import Batches, LabelledBatch
from m3i_fast.evaluation.feature_rows import Index, Joined, Rows
from m3i_fast.evaluation.probes.accuracy import top_k_hits
from m3i_fast.evaluation.probes.attentive import attentive_probe
from m3i_fast.evaluation.probes.linear_sweep import (
    BATCH_SIZE,
    CHOICE_SHARE,
    NUM_STEPS,
    LinearSweep,
    epoch_batches,
    kept_out,
    linear_sweep,
    steps_per_epoch,
)
from m3i_fast.measuring.decoding import decoded_batches
from m3i_fast.measuring.features import SplitFeatures
from m3i_fast.measuring.measure import (
    Inputs,
    Measured,
    MeasureSettings,
    accuracy_of_classes,
    fitted,
    mean_figure,
    steps_on,
)

# ---- Linear sweep --------------------------------------------------------------------------------


def linear_takes(settings: MeasureSettings) -> str:
    """Say how many steps all classifiers are trained."""
    return f"about {_linear_steps(settings):,} steps of {BATCH_SIZE:,} rows (--linear-steps)"


def linear(inputs: Inputs) -> Measured:
    """Fit DINOv2's classifiers to cached rows, and report the one that training rows choose."""
    train, measured = fitted(inputs), inputs.measured
    settings = inputs.settings
    found = linear_sweep(
        {
            name: (_joined(train, parts), _joined(measured, parts))
            for name, parts in linear_inputs(measured.names).items()
        },
        train.column("label"),
        measured.column("label"),
        num_steps=_linear_steps(settings),
        seed=settings.seed,
        device=settings.device,
        train_group=train.column("group"),
    )
    return _classified(
        found.logits[measured.labelled],
        inputs,
        settings={
            "input": found.chosen_input,
            "learning_rate": found.chosen_rate,
            "steps": _linear_steps(settings),
            "batch_size": BATCH_SIZE,
            "choice_rows": len(found.choice_rows),
            "fit_rows": len(found.fit_rows),
            "seed": settings.seed,
        },
        details={"sweep": _sweep(found)},
    )


def linear_inputs(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return what classifiers read, by name, of the features that an encoder has.

    The class token and the mean of the patches, each alone and together, and the last blocks side
    by side, as DINOv2 has them: class tokens where there are any, else means.
    """
    there = set(names)
    blocks = [
        tuple(part for part in (f"{kind}_{layer}" for layer in range(1, 5)) if part in there)
        for kind in ("class", "mean")
    ]
    last = blocks[0] or blocks[1]
    wanted = [("mean_1",), ("class_1",), ("class_1", "mean_1"), last]
    if blocks[0]:
        wanted.append((*last, "mean_1"))
    kept = [parts for parts in wanted if parts and there.issuperset(parts)] or [("image",)]
    return {"+".join(parts): parts for parts in kept}


def _linear_steps(settings: MeasureSettings) -> int:
    return steps_on(settings.device, settings.training.linear_steps, NUM_STEPS)


def _joined(features: SplitFeatures, parts: tuple[str, ...]) -> Rows:
    return Joined(*(features.rows(part) for part in parts))


def _sweep(found: LinearSweep) -> dict[str, Any]:
    """Return the accuracy of every classifier, by input and in the order of the rates."""
    scores = {"on the rows of the choice": found.choice_top1, "on measured rows": found.top1}
    return {
        "learning_rates": list(found.learning_rates),
        **{
            title: {name: row.tolist() for name, row in zip(found.inputs, of_all, strict=True)}
            for title, of_all in scores.items()
        },
    }


# ---- Attentive probe -----------------------------------------------------------------------------


def attentive_takes(settings: MeasureSettings) -> str:
    """Say how many epochs the probes are trained."""
    return f"epochs: {settings.training.attentive_epochs} (--attentive-epochs)"


def attentive(inputs: Inputs) -> Measured:
    """Train V-JEPA's probe at four rates on frozen tokens, and report the one that is chosen."""
    train, measured, settings = fitted(inputs), inputs.measured, inputs.settings
    tokens, size, seed = inputs.encoder.patch_tokens, settings.batch_size, settings.seed
    assert tokens is not None, "an encoder without patches is refused"
    fit, choice = kept_out(train.column("label"), train.column("group"), CHOICE_SHARE, seed)
    found = attentive_probe(
        tokens.encode,
        shuffled_batches(inputs, train, fit, size=size),
        ordered_batches(inputs, train, choice),
        ordered_batches(inputs, measured, measured.labelled),
        num_classes=len(settings.class_names),
        num_steps=settings.training.attentive_epochs * steps_per_epoch(len(fit), size),
        seed=seed,
        device=settings.device,
    )
    rates = found.learning_rates
    return _classified(
        found.logits,
        inputs,
        settings={
            "learning_rate": rates[found.chosen],
            "epochs": settings.training.attentive_epochs,
            "steps": found.loss.shape[1],
            "batch_size": min(size, len(fit)),
            "choice_rows": len(choice),
            "fit_rows": len(fit),
            "seed": seed,
        },
        details={
            "learning_rates": list(rates),
            "on the rows of the choice": found.choice_top1.tolist(),
            "on measured rows": found.top1.tolist(),
        },
        arrays={"loss": found.loss},
    )


# ---- Fine-tuning ---------------------------------------------------------------------------------


def fine_tuning_takes(settings: MeasureSettings) -> str:
    """Say how many epochs the encoder is trained."""
    return f"epochs: {settings.training.fine_tuning_epochs} (--fine-tuning-epochs)"


def fine_tuning(inputs: Inputs) -> Measured:
    """Train a copy of the encoder as MAE does, and report its last epoch."""
    train, measured, settings = fitted(inputs), inputs.measured, inputs.settings
    encoder, rows = inputs.encoder, train.labelled
    assert encoder.trainable is not None, "an encoder that cannot be trained is refused"
    size = min(settings.batch_size, len(rows)) // 2 * 2  # mixup pairs pictures
    if size == 0:
        raise ValueError("--batch-size: expected 2 or more, whose pictures are mixed, got 1")
    cfg = fine_tuning_config(settings.training.fine_tuning_epochs)
    found = fine_tune(
        encoder.trainable,
        shuffled_batches(inputs, train, rows, size=size),
        ordered_batches(inputs, measured, measured.labelled),
        cfg=cfg,
        num_classes=len(settings.class_names),
        steps_per_epoch=steps_per_epoch(len(rows), size),
        batch_size=size,
        seed=settings.seed,
        device=settings.device,
        dtype=encoder.dtype,
    )
    return _classified(
        found.logits,
        inputs,
        settings={
            "epochs": cfg.epochs,
            "steps": len(found.loss),
            "batch_size": size,
            "base_lr": cfg.base_lr,
            "layer_decay": cfg.layer_decay,
            "fit_rows": len(rows),
            "seed": settings.seed,
        },
        arrays={"loss": found.loss},
    )


def fine_tuning_config(epochs: int) -> FineTuningConfig:
    """Return MAE's settings for some epochs, a tenth of which are its warm-up."""
    published = FineTuningConfig()
    warmup = published.warmup_epochs * epochs / published.epochs
    return FineTuningConfig(epochs=epochs, warmup_epochs=warmup)


# ---- Batches -------------------------------------------------------------------------------------


def shuffled_batches(
    inputs: Inputs, features: SplitFeatures, rows: Index, *, size: int
) -> Batches:  # pictures [B, 3, S, S], labels [B] int64
    """Return batches of labelled rows in an order drawn by (seed, epoch), without the last part."""
    seed = inputs.settings.seed
    return _decoded(
        inputs,
        features,
        lambda epoch: epoch_batches(rows, batch_size=size, seed=seed, epoch=epoch),
    )


def ordered_batches(
    inputs: Inputs, features: SplitFeatures, rows: Index
) -> Batches:  # pictures [B, 3, S, S], labels [B] int64
    """Return batches of all the rows in their order, alike in every epoch."""
    size = inputs.settings.batch_size
    starts = range(0, len(rows), size)
    return _decoded(
        inputs, features, lambda epoch: (rows[start : start + size] for start in starts)
    )


def _decoded(
    inputs: Inputs, features: SplitFeatures, rows: Callable[[int], Iterable[Index]]
) -> Batches:
    label = features.column("label")

    def of_epoch(epoch: int) -> Iterator[LabelledBatch]:
        batches = decoded_batches(
            inputs.source,
            features.split,
            inputs.encoder.transform,
            [batch.tolist() for batch in rows(epoch)],
            workers=inputs.settings.workers,
        )
        for batch in batches:
            yield batch.pictures, torch.from_numpy(label[batch.rows])

    return of_epoch


def _classified(
    logits: NDArray[np.float32],  # [n, K] of the measured labelled rows
    inputs: Inputs,
    *,
    settings: dict[str, Any],
    details: dict[str, Any] | None = None,
    arrays: dict[str, NDArray[Any]] | None = None,
) -> Measured:
    """Return accuracy of top 1, of top 5 among more classes, predictions and their confidence."""
    rows = inputs.measured.labelled
    label = torch.from_numpy(inputs.measured.column("label")[rows])
    tensor = torch.from_numpy(logits)
    figures = [
        mean_figure(f"top {k}", top_k_hits(tensor, label, k=k).double().numpy(), rows)
        for k in (1, 5)
        if k == 1 or logits.shape[1] > k
    ]
    return Measured(
        figures=tuple(figures),
        settings=settings,
        details={**(details or {}), "by_class": accuracy_of_classes(figures[0], inputs)},
        arrays={
            **(arrays or {}),
            "predicted": logits.argmax(1),
            "confidence": tensor.double().softmax(1).amax(1).numpy(),
            "rows": rows,
        },
    )
