"""A run trained on whole batches, or on parts of them: added up, or on other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.transformer import vit
from m3i_fast.objectives.terms import dense
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader
from m3i_fast.recipes import shrink
from tests.shared.engine.small_run import TEXT
from tests.shared.engine.two_ranks import full
from tests.shared.ranks import part

NUM_STEPS = 3


def in_dtype(batch: Batch, double: bool) -> Batch:
    return replace(batch, boxes=batch.boxes.double()) if double else batch


@contextmanager
def in_double_precision() -> Iterator[None]:
    """Weights in fp64, and what modules are given: views and positions come in fp32."""

    def widen(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        single = torch.float32
        return tuple(x.double() if getattr(x, "dtype", None) == single else x for x in given)

    pixels, embed = dense.normalised_pixels, vit.embed_patches
    hook = register_module_forward_pre_hook(widen)
    torch.set_default_dtype(torch.float64)
    dense.normalised_pixels = lambda *a: pixels(*a).double()
    vit.embed_patches = lambda images, *weights: embed(images.double(), *weights)
    try:
        yield
    finally:
        dense.normalised_pixels, vit.embed_patches = pixels, embed
        torch.set_default_dtype(torch.float32)
        hook.remove()


def run_of_eight(dataset: Path, cfg: TrainConfig) -> TrainConfig:
    """Eight pictures a step, all of them asked."""
    cfg = shrink(cfg, path=dataset, num_classes=9, text=TEXT)
    mixing = replace(cfg.objective.mixing, dense_fraction=1.0)
    return replace(
        cfg,
        num_steps=NUM_STEPS,
        num_threads=1,
        checkpoint_every=NUM_STEPS,
        data=replace(cfg.data, batch_size=8),
        optim=replace(cfg.optim, matrices="adamw", clip_grad_norm=0.1),
        objective=replace(cfg.objective, mixing=mixing),
    )


def in_parts(cfg: TrainConfig, num_parts: int, **parallel: Any) -> TrainConfig:
    data = replace(cfg.data, batch_size=cfg.data.batch_size // num_parts)
    return replace(cfg, data=data, parallel=ParallelConfig(**parallel))


def train_in_parts(
    cfg: TrainConfig, whole: TrainConfig, out: Path, *, rank: int, num_parts: int
) -> dict[str, Tensor]:
    """Losses and what is saved, after steps on parts of the whole's batches.

    Part k of the rank r is part k * ranks + r of the whole batch; one process has all.
    """
    with in_double_precision():
        loader, trainer = Loader(whole.data), Trainer(cfg, out)
        count = cfg.parallel.accumulate
        ranks = num_parts // count if num_parts > 1 else 1
        mine = [k * ranks + rank for k in range(count)] if num_parts > 1 else []
        found: dict[str, Tensor] = {}
        for step in range(NUM_STEPS):
            batch = in_dtype(next(loader), True)
            batch = replace(batch, label=batch.sample_id % 9)  # as many members in each part
            batches = [part(batch, i, num_parts) for i in mine] if mine else [batch]
            metrics = trainer.train_step(*batches)
            found[f"loss {step}"] = trainer.world.mean(metrics["loss/total"].clone())
            found[f"norm {step}"] = metrics["optim/grad_norm"].clone()
            for name, value in metrics.items():
                if name.startswith("members/"):
                    found[f"{name} {step}"] = trainer.world.mean(value.clone()) * trainer.world.size
        tensors = tensors_of(trainer.objective, trainer.optimizer)
        found |= {name: full(tensor) for name, tensor in tensors.items()}
        trainer.loader.close()
        loader.close()
        trainer.run.close()
    return found


def assert_close_states(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.startswith("members/category"):
            continue  # in a process group those of all ranks, on each
        torch.testing.assert_close(
            ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
