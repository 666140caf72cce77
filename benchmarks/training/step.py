"""One training step of M3I beside one that is written plainly, from the paper.

    m3i-fast bench step [--batch-size 128] [--no-record]
    m3i-fast bench step --explain demo      # or m3i_vit_s: where the time of its step goes

`m3i_fast` is the step that trains, `TrainStep`: with the guard's copies and judgement, and an
optimiser and an average that a flag on the device can skip. `eager` is M3I as one writes it first,
without a guard: both views of every image go through the EMA encoder though half of its tokens are
asked for, each target has a decoder call over all cells that it may ask, and likelihoods are
expressions of torch over all logits; AdamW by foreach, the moving average by a loop. `eager, asked
only`: the same, the EMA encoder given only the images that a term asks. The networks, their
weights, the drawn masks and the running statistics are ours; local views are left out, and every
cell is asked. The loss is the same on all sides, compared before they are timed.
Steps are whole: draw, forward, backward, clip, optimiser, moving average, on one batch in memory.
Not timed: the loader.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import (
    Device,
    measure,
    publish,
    ratio_table,
    resolve,
)
from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.benchmarks.training.explain_step import explain, explained, with_batch
from m3i_fast.benchmarks.training.plain_step import eager_ema, eager_loss
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_precision
from m3i_fast.engine.train_step import TrainStep, build_train_step, draw_step_mix
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import demo, recipes
from m3i_fast.terminal import make_console

SUBJECT = "step"
OURS, EAGER, ASKED_ONLY = "m3i_fast", "eager", "eager, asked only"
Loss = Callable[[MutualInformation, Batch, Mix], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    batch_size: int = 128
    """Source images a step; even."""
    dim: int = 192
    """Width of the image encoder, of heads of 64."""
    depth: int = 6
    """Its blocks."""
    num_samples: int = 20
    """Steps of each, interleaved."""
    explain: str = ""
    """Instead: divide the step of this recipe, as demo or m3i_vit_s, by stage and by kind of
    operator, and show how near its products come to this machine's rate. Nothing is recorded."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/step.jsonl."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size: expected an even number, got {self.batch_size}")
        if self.dim < 64 or self.dim % 64:
            raise ValueError(f"dim: expected a multiple of 64, got {self.dim}")
        if self.explain and self.explain not in recipes():
            raise ValueError(
                f"explain: expected one of {', '.join(recipes())}, got {self.explain!r}"
            )


def train_config(cfg: Config) -> TrainConfig:
    """Return the demo's recipe with another encoder, without local views, by AdamW.

    Every cell that may be asked is, a blank one too, and captions are whole. No warm-up, as the
    plain step has none.
    """
    recipe = demo()
    mixing = replace(recipe.objective.mixing, min_contrast=0, num_queries=0, token_dropout=0.0)
    return replace(
        recipe,
        objective=replace(recipe.objective, mixing=mixing),
        vision=vit_demo(dim=cfg.dim, depth=cfg.depth, num_heads=cfg.dim // 64),
        data=replace(recipe.data, batch_size=cfg.batch_size, local_views=None),
        optim=replace(recipe.optim, matrices="adamw", warmup_fraction=0.0),
        precision="fp32",
        device="cuda" if resolve(cfg.device) == "cuda" else "cpu",
    )


# ---- Whole steps ---------------------------------------------------------------------------------


def build_our_step(train: TrainConfig, world: World | None = None) -> TrainStep:
    """Build the step that trains, from the weights of its seed. Default world: one process."""
    world = world or World(torch.device(train.device))
    arithmetic = resolve_precision(
        capabilities_of(world.device),
        gemm_shapes(train),
        train.precision,
        train.backend,
        compiled=train.compile,
    )
    return build_train_step(train, world, arithmetic)


def our_step(train: TrainConfig, batch: Batch) -> Callable[[], Tensor]:
    """Build the step that trains, to be called again and again; it returns its loss []."""
    train_step = build_our_step(train)

    def step() -> Tensor:
        if train_step.steps_taken == train.num_steps:  # schedules begin anew where they end
            train_step.steps_taken = 0
        return train_step(batch)["loss/total"]

    return step


def eager_step(train: TrainConfig, batch: Batch, loss_of: Loss) -> Callable[[], Tensor]:
    """Build a plain step from the same weights, to be called again and again; as `our_step`."""
    torch.manual_seed(train.seed)
    with torch.device(train.device):
        model = build_objective(train)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optim = train.optim
    optimizer = torch.optim.AdamW(
        learnt, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, foreach=True
    )
    numbers = itertools.cycle(range(train.num_steps))

    def step() -> Tensor:
        loss = loss_of(model, batch, draw(train, batch, next(numbers)))
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, optim.clip_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.finish_step()
        for pair in model.momentum_pairs():
            eager_ema(*pair, momentum=train.ema.momentum)
        return loss.detach()

    return step


def draw(train: TrainConfig, batch: Batch, step: int) -> Mix:
    """Draw what our step of this index mixes, for the plain one."""
    first = step * batch.batch_size
    mix = draw_step_mix(train, batch, first_position=first, step=step)
    return mix.to(torch.device(train.device))


def make_steps(train: TrainConfig) -> dict[str, Callable[[], Tensor]]:
    """Return the timed steps, on one batch; their first losses are equal."""
    batch = draw_batch(train).to(train.device)
    steps = {
        OURS: our_step(train, batch),
        EAGER: eager_step(train, batch, eager_loss),
        ASKED_ONLY: eager_step(train, batch, partial(eager_loss, asked_only=True)),
    }
    expected, *others = (step() for step in steps.values())
    for loss in others:
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    return steps


# ---- Rows ----------------------------------------------------------------------------------------


def figures_of(cfg: Config) -> dict[str, Any]:
    train = train_config(cfg)
    timings = measure(make_steps(train), device=train.device, num_samples=cfg.num_samples)
    milliseconds = {name: timing.median_ms for name, timing in timings.items()}
    batch_size, mixing = train.data.batch_size, train.objective.mixing
    return {
        "device": train.device,
        "num_threads": torch.get_num_threads(),
        "dtype": "float32",
        "batch_size": batch_size,
        **{name: getattr(train.vision, name) for name in ("image_size", "dim", "depth")},
        "mixing": mixing.mode,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "images_per_s": {name: 1e3 * batch_size / ms for name, ms in milliseconds.items()},
        "times_slower_than_ours": {n: ms / milliseconds[OURS] for n, ms in milliseconds.items()},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    heading = f"{first['batch_size']}x{first['image_size']}^2, {first['dim']}x{first['depth']}"

    def rate(row: dict[str, Any], name: str) -> str:
        return f"{row['images_per_s'][name]:.3g}"

    return ratio_table(SUBJECT, heading, rows, lambda row: "step", {"images/s": rate})


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    if cfg.explain:
        train = with_batch(recipes()[cfg.explain](), batch_size=cfg.batch_size, device=cfg.device)
        figures = explain(train, num_samples=cfg.num_samples)
        make_console().print(*explained(cfg.explain, figures), sep="\n")
        return
    publish(SUBJECT, [figures_of(cfg)], table, record=cfg.record)
