"""One training step: the only place where its parts are put together.

The trainer, the benchmarks, the profiler and the plan's memory tracing all call `TrainStep`, so
that they time, profile and predict the step that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.engine.build import build_objective, stacks_of
from m3i_fast.engine.cuda_graphs import replay_with_graphs
from m3i_fast.engine.guard.guard import Guard
from m3i_fast.engine.optim.device_schedules import DeviceSchedules
from m3i_fast.engine.optim.ema import update_ema
from m3i_fast.engine.optim.optimizers import build_optimizer, set_schedules
from m3i_fast.engine.optim.schedules import lr_schedule, momentum_schedule, weight_decay_schedule
from m3i_fast.engine.parallel.accumulation import (
    expect_additive,
    gradient_sync,
    merge_batch_metrics,
)
from m3i_fast.engine.parallel.local_shards import GradientNorm
from m3i_fast.engine.parallel.ranks import World, average_replicated, distribute
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.precision.attention import StepAttention, choose_attention
from m3i_fast.engine.precision.cast_weights import cast_weights
from m3i_fast.engine.precision.cpu_products import fast_cpu_products
from m3i_fast.engine.precision.fp8 import (
    expect_fp8,
    forward_context,
    keep_calls_apart,
    layers_of,
)
from m3i_fast.engine.step_graph import Recorder, StepGraph, StepResult
from m3i_fast.keyed_draws import Purpose, words
from m3i_fast.objectives.any_shape.draw import draw_packed_mix
from m3i_fast.objectives.mixing import Mix, draw_branch_priority, draw_mix, draw_slice_key
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.packed_views import encode_packed_inputs, encode_packed_targets
from m3i_fast.objectives.step_context import WHOLE, BatchWeight, Stage, no_stage
from m3i_fast.pipelines.any_shape.batch import AnyBatch, PackedBatch, step_counts
from m3i_fast.pipelines.batch import Batch

# (module, trained=...) -> the context of `cast_weights`
CastWeights = Callable[..., AbstractContextManager[None]]


def no_cast(model: nn.Module, *, trained: bool) -> AbstractContextManager[None]:
    """Leave the weights as they are."""
    return nullcontext()


class ForwardPass(nn.Module):
    """Targets, inputs and objective as one module, whose gradients the ranks all-reduce."""

    def __init__(self, objective: MutualInformation, cast: CastWeights = no_cast) -> None:
        super().__init__()
        self.objective, self._cast = objective, cast

    def forward(
        self,
        batch: AnyBatch,
        mix: Mix,
        stage: Stage,
        *,
        monitor: bool,
        measure: bool,
        weight: BatchWeight = WHOLE,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss [] and the metrics of `MutualInformation`, each part in its stage."""
        objective = self.objective
        with stage("fwd.target"), ExitStack() as casts:
            for encoder in objective.average_encoders():
                casts.enter_context(self._cast(encoder, trained=False))
            if isinstance(batch, PackedBatch):
                targets = encode_packed_targets(objective, batch, mix)
            else:
                targets = objective.encode_targets(batch, mix)
        with stage("fwd.input"):
            if isinstance(batch, PackedBatch):
                encoded = encode_packed_inputs(objective, batch, mix)
            else:
                encoded = objective.encode_inputs(batch, mix)
        return objective(
            encoded,
            targets,
            cast(Batch, batch),  # terms read the fields that both have, but those of cells
            mix,
            monitor=monitor,
            measure=measure,
            stage=stage,
            weight=weight,
        )


def no_backoff(step: int) -> float:
    """Return 1, which leaves the learning rate of the schedule unchanged."""
    return 1.0


class TrainStep:
    """Takes one optimiser step of a run a call, on this rank's batches.

    objective: built by `build_objective`, on the meta device where its weights are sharded; it is
    distributed over the ranks here. stage: a context manager for each named part of the step.
    lr_scale: the guard's back-off, a factor of the learning rate by the index of the step.
    recorder: what captures the step where `cuda_graphs` is step; a GPU's unless given.

    Raises ValueError where `parallel.accumulate`, `cuda_graphs` or `optim.impl` is set to what this
    objective or device does not support.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        objective: MutualInformation,
        world: World,
        arithmetic: Arithmetic,
        *,
        stage: Stage = no_stage,
        lr_scale: Callable[[int], float] = no_backoff,
        recorder: Recorder | None = None,
    ) -> None:
        expect_additive(cfg, objective)
        self.cfg, self.objective, self.world, self.arithmetic = cfg, objective, world, arithmetic
        self._stage, self._lr_scale = stage, lr_scale
        self._cast = _cast_of(cfg, world, arithmetic)
        self.model = _distribute(cfg, objective, world, arithmetic, self._cast)
        self._named = list(objective.named_parameters())
        self.optimizer = build_optimizer(cfg.optim, objective)
        self.guard = Guard(cfg.guard, objective, world)
        self._lr = lr_schedule(cfg.optim, cfg.num_steps)
        self._weight_decay = weight_decay_schedule(cfg.optim, cfg.num_steps)
        self._momentum = momentum_schedule(cfg.ema, cfg.num_steps)
        self.graph: StepGraph | None = None
        """The captured step, where `cuda_graphs` is step."""
        self._on_device: DeviceSchedules | None = None
        if cfg.cuda_graphs == "step":
            self.graph = StepGraph(self._compute, world, stage=stage, recorder=recorder)
            self._on_device = DeviceSchedules(cfg.optim, self.optimizer, world.device)
        self.steps_taken = 0
        """Number of steps taken, skipped ones included; the index of the next step."""
        self.samples_taken = 0
        """Samples that all ranks have taken in them: the position at which the next step begins."""

    def __call__(self, *batches: AnyBatch, monitor: bool = False) -> dict[str, Tensor]:
        """Take one step without a host synchronisation and return its metrics, [] each.

        Before the few steps in which a basis of PHI-S is renewed the host waits for the device.
        batches: `parallel.accumulate` of them, of squares or of views of any shape. monitor: also
        compute the collapse monitors. Afterwards `guard.skip` is 1 if the step was skipped.
        """
        with self.matrix_products():
            return self._take(batches, monitor)

    @cached_property
    def attention(self) -> StepAttention:
        """Return the kernels of attention; raise ValueError as `choose_attention`."""
        return choose_attention(self.cfg, self.arithmetic, self.world.device)

    @contextmanager
    def matrix_products(self) -> Iterator[None]:
        """Choose the kernels of attention, and this CPU's fastest matrix products."""
        products = fast_cpu_products(self.world.device, self.arithmetic.compute_dtype)
        with products, self.attention.context():
            yield

    def _take(self, batches: Sequence[AnyBatch], monitor: bool) -> dict[str, Tensor]:
        step = self.steps_taken
        self._seed_generator()
        self._set_schedules(step)
        self._renew_snapshot(step)
        self.objective.renew_bases(step)
        measure = self.objective.balance.due(step)
        if self.graph is None or monitor or measure:
            mixes = map(self.draw_mix, batches)
            result = self._compute(
                batches, mixes, stage=self._stage, monitor=monitor, measure=measure
            )
        else:
            with self._stage("mix"):
                drawn = list(map(self._draw_on_host, batches))
            result = self.graph(cast(Sequence[Batch], batches), drawn)  # any_shape_conflicts
        ids = torch.cat([batch.sample_id for batch in batches])
        self.guard.record(step, result.judgement, names=result.gradients, sample_ids=ids)
        self.guard.skip = result.skip
        self.steps_taken += 1
        self.samples_taken += sum(step_counts(batches, self.world.size))
        return result.metrics

    def _set_schedules(self, step: int) -> None:
        lr, decay = self.lr_at(step), float(self._weight_decay[step])
        if self._on_device is None:
            set_schedules(self.optimizer, lr=lr, weight_decay=decay)
        else:
            momentum = self.momentum_at(step)
            self._on_device.write(lr=lr, weight_decay=decay, momentum=momentum)

    def _renew_snapshot(self, step: int) -> None:
        """Copy the moving average into the snapshot, every so many steps; no graph holds that."""
        cfg, objective = self.cfg.objective, self.objective
        if cfg.uses(encoder="snapshot") and step % cfg.snapshot_every == 0:
            update_ema(objective.snapshot.encoder, objective.target_encoder.encoder, momentum=0.0)

    def _compute(
        self,
        batches: Sequence[AnyBatch],
        mixes: Iterator[Mix],
        *,
        stage: Stage,
        monitor: bool = False,
        measure: bool = False,
    ) -> StepResult:
        """Run all of a step that is the device's, as a graph can hold it."""
        self.guard.save_buffers()
        metrics = self._backward(batches, mixes, stage, monitor=monitor, measure=measure)
        with stage("clip"):
            names = tuple(name for name, p in self._named if p.grad is not None)
            norm = self._clip(stage)
            metrics["optim/grad_norm"] = norm.total
            judgement = self.guard.judge(metrics, norm)
            skip = self.guard.skip
        with stage("optim"):
            if self._on_device is not None:
                self._on_device.decay(skip)
            self.optimizer.step(skip)
            self.optimizer.zero_grad(set_to_none=True)
            self.objective.finish_step()
            self.guard.restore_buffers()
        with stage("ema"):
            on_device = self._on_device
            momentum = on_device.momentum if on_device else self.momentum_at(self.steps_taken)
            for pair in self.objective.momentum_pairs():
                update_ema(*pair, momentum=momentum, skip=skip)
        return StepResult(metrics=metrics, skip=skip, judgement=judgement, gradients=names)

    def _seed_generator(self) -> None:
        """Seed torch's generators by the step, for modules of others: ours draw by position.

        All ranks have the same seed; a resume then repeats such draws on as many ranks.
        """
        begin = np.array([self.samples_taken])
        word = words(begin, 1, seed=self.cfg.seed, purpose=Purpose.GENERATOR)
        torch.manual_seed(int(word[0, 0] >> np.uint64(32)))  # of 32 bits a CPU's reads

    def _backward(
        self,
        batches: Sequence[AnyBatch],
        mixes: Iterator[Mix],
        stage: Stage,
        *,
        monitor: bool,
        measure: bool,
    ) -> dict[str, Tensor]:
        """Accumulate the gradients of the mean loss over the batches; return the merged metrics."""
        of_batches = []
        counts = step_counts(batches, self.world.size)
        for index, batch in enumerate(batches):
            is_last = index + 1 == len(batches)
            with stage("mix"):
                mix = next(mixes)
            with gradient_sync(self.model, is_last), self._cast(self.objective, trained=True):
                with forward_context(self.arithmetic, self.world.device):
                    number = index * self.world.size + self.world.rank
                    loss, metrics = self.model(
                        batch,
                        mix,
                        stage,
                        monitor=monitor and is_last,
                        measure=measure,
                        weight=BatchWeight.of(counts, number, self.world.size),
                    )
                with stage("bwd"):
                    (loss / len(batches)).backward()
            if monitor and is_last:
                metrics |= self.objective.gradient_metrics()
            of_batches.append(metrics)
        return merge_batch_metrics(of_batches)

    def _clip(self, stage: Stage) -> GradientNorm:
        parameters = [p for _, p in self._named if p.grad is not None]
        with stage("comm"):
            average_replicated(parameters, self.world)
        return self.optimizer.clip_grad_norm(parameters, self.cfg.optim.clip_grad_norm)

    def draw_mix(self, batch: AnyBatch) -> Mix:
        """Draw mixing and masks of a batch of the next step, on this rank's device."""
        return self._draw_on_host(batch).to(self.world.device)

    def _draw_on_host(self, batch: AnyBatch) -> Mix:
        return draw_step_mix(
            self.cfg, batch, first_position=self.samples_taken, step=self.steps_taken
        )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the step of this index, back-off included."""
        return float(self._lr[step]) * self._lr_scale(step)

    def momentum_at(self, step: int) -> float:
        """Return the momentum of the moving average at the step of this index."""
        return float(self._momentum[step])


def build_train_step(
    cfg: TrainConfig,
    world: World,
    arithmetic: Arithmetic,
    *,
    stage: Stage = no_stage,
    lr_scale: Callable[[int], float] = no_backoff,
    recorder: Recorder | None = None,
) -> TrainStep:
    """Build the objective of a run from its seed, and the step that trains it.

    Seeds torch's global generator. Raises ValueError as `build_objective` and `TrainStep` do.
    """
    torch.manual_seed(cfg.seed)
    with world.device:
        objective = build_objective(
            cfg,
            world.group,
            layers=layers_of(arithmetic, cfg.fp8_min_dim),
            on_meta=world.shards_weights(cfg.parallel),
        )
    return TrainStep(
        cfg,
        objective,
        world,
        arithmetic,
        stage=stage,
        lr_scale=lr_scale,
        recorder=recorder,
    )


def draw_step_mix(cfg: TrainConfig, batch: AnyBatch, *, first_position: int, step: int) -> Mix:
    """Draw the mix of a batch of a run's step on the CPU, by the positions of its samples.

    first_position: that at which the step begins, alike for all its batches and ranks. Raises
    ValueError as `draw_mix` does.
    """
    draw: Callable[..., Mix] = partial(draw_mix, grid=cfg.vision.grid)
    if isinstance(batch, PackedBatch):
        draw = partial(draw_packed_mix, grids=batch.grids[:, : batch.num_global])
    mix = draw(
        cfg.objective.mixing,
        position=batch.position,
        first_position=first_position,
        context_length=batch.token_ids.shape[1],
        seed=cfg.seed,
        step=step,
        num_steps=cfg.num_steps,
    )
    if cfg.objective.uses(regulariser="sigreg"):
        mix = replace(mix, slice_key=draw_slice_key(first_position, cfg.seed))
    if not cfg.vision.drop_path_rate:
        return mix
    rows, local = draw_branch_priority(
        cfg.objective.mixing,
        position=batch.position,
        num_views=cfg.objective.num_encoded_views,
        num_local=batch.num_local,
        num_layers=cfg.vision.num_layers,
        seed=cfg.seed,
    )
    return replace(mix, branch_priority=rows, local_branch_priority=local)


def _cast_of(cfg: TrainConfig, world: World, arithmetic: Arithmetic) -> CastWeights:
    """Return `cast_weights`, or a context that leaves the weights to who casts them otherwise.

    FSDP2 gathers those of blocks in bf16, torch.compile casts them in its kernels, a captured
    module casts what it reads from the parameters' own memory, and FP8 layers quantise the
    parameters themselves.
    """
    in_modules = cfg.compile or cfg.cuda_graphs == "modules"
    elsewhere = world.shards_weights(cfg.parallel) or in_modules
    low = arithmetic.compute_dtype != torch.float32
    if low and arithmetic.backend == "torch" and not elsewhere:
        return partial(cast_weights, dtype=arithmetic.compute_dtype)
    return no_cast


def _distribute(
    cfg: TrainConfig,
    objective: MutualInformation,
    world: World,
    arithmetic: Arithmetic,
    cast: CastWeights,
) -> nn.Module:
    """Return the forward pass as the ranks run it, all-reducing gradients in the backward pass."""
    forward = ForwardPass(objective, cast)
    keep_calls_apart(forward, arithmetic)
    expect_fp8(forward, arithmetic)
    if cfg.cuda_graphs == "modules":
        replay_with_graphs(forward, world.device)
    return distribute(
        forward,
        stacks_of(objective),
        cfg.parallel,
        world,
        compute_dtype=arithmetic.compute_dtype,
        copies=[copy for copy, _ in objective.copies()],
    )
