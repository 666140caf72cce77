"""What one training step holds in memory: the real step, run on tensors without data.

`TrainStep`, the step that trains, is taken once in a FakeTensorMode: shapes, dtypes, what autograd
saves, what the guard copies and when all of it is freed are those of a run, and nothing is tuned.
Every image has a label and a caption: the largest step. Not seen: what kernels allocate for
themselves, but for the blocks of a likelihood of many columns; fragmentation, and what
torch.compile changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from m3i_fast.config import TrainConfig
from m3i_fast.config.columns import REGION_WIDTH, ColumnConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.costs.packed_pictures import most_samples
from m3i_fast.engine.build import blocks_of, build_objective
from m3i_fast.engine.cuda_graphs import REPLAYED
from m3i_fast.engine.optim.skippable_step import steps_as_on
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.train_step import TrainStep, draw_step_mix
from m3i_fast.objectives.mixing import Mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms import Caption, TextTokens
from m3i_fast.ops.boltzmann_rows import ROWS_OP, scratch_bytes
from m3i_fast.pipelines.any_shape.batch import AnyBatch
from m3i_fast.pipelines.batch import Batch
from m3i_fast.planning.sharded_units import GatherCounter
from m3i_fast.planning.tensor_tracker import GRADIENTS, OTHER, TensorTracker

PARAMETERS, AVERAGE, BUFFERS = "parameters", "EMA copies", "buffers"
FROZEN = "frozen parameters"
STATES, BATCH = "optimiser states", "batch"
TEACHER = "frozen teacher"
HELD = (PARAMETERS, FROZEN, AVERAGE, BUFFERS, STATES, BATCH)
TARGET, ENCODER, TEXT = "target encoder", "encoder", "text encoder"
DECODER, HEADS = "decoder", "heads and likelihoods"


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes of one rank, by part."""

    held: Mapping[str, int]
    """From step to step: the parts in HELD; the guard's copies of buffers are with the buffers."""
    activations: Mapping[str, int]
    """Alive when the loss is known, for the backward pass."""
    gradients: int
    """All of them, when the backward pass ends."""
    peak: Mapping[str, int]
    """All that is alive at the step's peak."""
    sharded_peak: Mapping[str, int]
    """The same of a step whose gradients are sharded, before anything is divided."""
    ddp_peak: Mapping[str, int]
    """The same of a step under DDP, whose buckets hold all gradients from the start to the end."""
    gathers: Mapping[str, int]
    """Times that a step gathers the weights of each block, by its name, where they are sharded."""
    graphs: Sequence[int] = ()
    """With CUDA graphs of modules: what each keeps of inputs, outputs and gradients. Activations,
    which it keeps too, are where they are without graphs."""

    @property
    def of_a_step(self) -> int:
        """Bytes at the peak that are free again after the step, which a graph of it keeps."""
        return sum(self.peak.values()) - sum(self.held.values())


def trace(cfg: TrainConfig, *, bf16: bool, cuda: bool = True, num_shards: int = 1) -> Footprint:
    """Return the footprint of a step of `cfg`, without data, GPU or memory; takes seconds.

    A step of several batches is traced with one of them. bf16: autocast, else fp32. cuda: autocast
    widens layer norms, and optimisers take as many tensors together, as on CUDA and not on a CPU.
    num_shards: ranks that share a gradient, for `sharded_peak`. Of a budget of tokens the largest
    batch is traced (`largest_batch`).
    """
    cfg = largest_batch(cfg)
    one_batch, has_graphs = replace(cfg.parallel, accumulate=1), cfg.cuda_graphs == "modules"
    casts_apart = cfg.compile or has_graphs or num_shards > 1
    cfg = replace(cfg, compile=False, cuda_graphs="none", parallel=one_batch)
    mix, objective = draw_first_mix(cfg), build_on_meta(cfg)
    rows_scratch = partial(scratch_bytes, device="cuda" if cuda else "cpu")
    tracker = TensorTracker(num_shards=num_shards, scratch={ROWS_OP: rows_scratch})
    stages = _Stages(tracker)
    counter = GatherCounter(objective)
    with FakeTensorMode() as fake, tracker:
        for module in (objective, *objective.teachers.values()):
            module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        batch = empty_batch(cfg)
        if cfg.objective.teacher_cache is not None:
            batch = replace(batch, features=_empty_features(cfg, objective))
        mix = Mix(**{name: _faked(fake, getattr(mix, name)) for name in mix.__slots__})
        _book_what_is_held(tracker, objective, batch, mix)
        _name_parts(tracker, objective)
        graphs = _count_graphs(objective) if has_graphs else []
        if cuda:
            _widen_norms(objective)
        with tracker.within(BUFFERS):
            train_step = _StepOfMix(
                replace(cfg, compile=casts_apart),  # the model is not; only casts ask for it
                objective,
                World(torch.device("cpu")),
                _arithmetic(bf16),
                stage=stages.stage,
            )
        train_step.mix = mix
        tracker.reset_peak()
        with steps_as_on("cuda") if cuda else nullcontext():
            train_step(batch)
        footprint = stages.footprint(counter.gathers, keeps_activations=has_graphs)
        return replace(footprint, graphs=graphs)


def largest_batch(cfg: TrainConfig) -> TrainConfig:
    """Return a config of squares whose batch takes as much memory as any of a budget of tokens.

    That is the batch of the smallest views alone: it has all the tokens that fit, and the most
    samples, each with prefix tokens, a caption and rows of the losses. A config of squares is
    returned as it is.
    """
    if not cfg.data.any_shape:
        return cfg
    assert isinstance(cfg.vision, ViTConfig)  # any_shape_conflicts
    images = cfg.objective.mixing.images_per_input
    samples = most_samples(cfg.data, cfg.vision.patch_size, images)
    shown, local = cfg.data.global_views, cfg.data.local_views
    if local is not None:
        local = replace(local, size=local.sizes[0], size_range=None, blur_kernel_size=None)
    data = replace(
        cfg.data,
        max_tokens_per_batch=0,
        batch_size=samples,
        global_views=replace(shown, size=shown.sizes[0], size_range=None, blur_kernel_size=None),
        local_views=local,
    )
    return replace(cfg, data=data, vision=replace(cfg.vision, image_size=shown.sizes[0]))


def build_on_meta(cfg: TrainConfig) -> MutualInformation:
    """Build the model on the meta device.

    Raises ValueError for a term with a frozen teacher where the config names none, and as
    `build_objective` for one that cannot be loaded.
    """
    if None in cfg.objective.teachers.values():
        raise ValueError(
            "objective.terms: expected no term with a frozen encoder, or its run as "
            "objective.teacher, got teacher None"
        )
    return build_objective(replace(cfg, compile=False), on_meta=True)


def count_parameters(objective: MutualInformation) -> dict[str, int]:
    """Count the trained parameters by part, all frozen ones, and all that follow by EMA."""
    counts = {ENCODER: _count(objective.encoder), DECODER: _count(objective.decoders)}
    counts[DECODER] += sum(map(_count, _captioners(objective)))
    counts[TEXT] = sum(_count(term.text_encoder) for term in objective.terms_of(Caption))
    counts["heads"] = _count(objective) - sum(counts.values())
    frozen, averages = _untrained(objective)
    counts[FROZEN] = sum(p.numel() for p in frozen)
    counts[AVERAGE] = sum(p.numel() for p in averages)
    return counts


def trained(parameters: Mapping[str, int]) -> int:
    """Return how many parameters learn by gradients."""
    return sum(size for part, size in parameters.items() if part not in (FROZEN, AVERAGE))


def block_sizes(objective: nn.Module) -> list[int]:
    """Return the trained parameters of each block that has any."""
    return [size for size in map(_count, blocks_of(objective)) if size]


def largest_block(objective: nn.Module) -> int:
    """Return the parameters of the largest block, trained or not: what FSDP gathers at once."""
    return max((sum(p.numel() for p in b.parameters()) for b in blocks_of(objective)), default=0)


def draw_first_mix(cfg: TrainConfig) -> Mix:
    """Draw the mix of the first step, with its values."""
    with torch.device("meta"):
        batch = empty_batch(cfg)
    return draw_step_mix(cfg, batch, first_position=0, step=0)


def empty_batch(cfg: TrainConfig) -> Batch:
    """Return a batch of the config's shapes, whose values are not set."""
    size, data = cfg.data.batch_size, cfg.data

    def views(side: int, count: int) -> tuple[Tensor, ...]:
        return tuple(torch.empty(size, 3, side, side, dtype=torch.uint8) for _ in range(count))

    global_views = views(data.global_views.size, data.global_views.count)
    local = data.local_views
    local_views = views(local.size, local.count) if local is not None else ()
    return Batch(
        global_views=global_views,
        local_views=local_views,
        boxes=torch.empty(size, len(global_views) + len(local_views), 5),
        image_size=torch.empty(size, 2),
        token_ids=torch.empty(size, cfg.text.context_length, dtype=torch.int32),
        num_tokens=torch.empty(size, dtype=torch.int64),
        label=torch.empty(size, dtype=torch.int64),
        sample_id=torch.empty(size, dtype=torch.int64),
        group_id=torch.empty(size, dtype=torch.int64),
        position=torch.arange(size, device="cpu"),
        columns={column.name: _empty_column(cfg, column) for column in cfg.columns},
    )


def _empty_features(cfg: TrainConfig, objective: MutualInformation) -> dict[str, Tensor]:
    """Return what a batch holds of frozen encoders, in the widest dtype that they may have."""
    shape = cfg.data.batch_size, cfg.vision.grid**2
    return {name: torch.empty(*shape, each.dim) for name, each in objective.teachers.items()}


def _empty_column(cfg: TrainConfig, column: ColumnConfig) -> Tensor:
    size, local = cfg.data.batch_size, cfg.data.local_views
    if column.kind == "regions":
        views = cfg.data.global_views.count + (local.count if local is not None else 0)
        return torch.empty(size, views, cfg.data.max_regions, REGION_WIDTH, dtype=torch.int32)
    dtype = {"numbers": torch.float32, "text": torch.int32}.get(column.kind, torch.int64)
    shape = (size,) if column.kind == "class" else (size, column.size)
    return torch.empty(shape, dtype=dtype)


def _faked(fake: FakeTensorMode, value: Any) -> Any:
    return fake.from_tensor(value) if isinstance(value, Tensor) else value


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _captioners(objective: MutualInformation) -> list[nn.Module]:
    return [t.decoder for t in objective.terms.values() if isinstance(t, TextTokens)]


def _untrained(
    objective: MutualInformation,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the frozen parameters, and those that follow by EMA."""
    averages = [p for average, _ in objective.copies() for p in average.parameters()]
    follow = {id(p) for p in averages}
    frozen = [p for p in objective.parameters() if not p.requires_grad and id(p) not in follow]
    return frozen, averages


def _book_what_is_held(
    tracker: TensorTracker, objective: MutualInformation, batch: Batch, mix: Mix
) -> None:
    parameters = list(objective.parameters())
    tracker.book(PARAMETERS, (p for p in parameters if p.requires_grad))
    frozen, averages = _untrained(objective)
    tracker.book(FROZEN, frozen)
    tracker.book(AVERAGE, averages)
    tracker.book(BUFFERS, objective.buffers())
    for teacher in objective.teachers.values():
        tracker.book(TEACHER, (*teacher.parameters(), *teacher.buffers()))
    tracker.watch_casts(parameters)
    given = [getattr(part, name) for part in (batch, mix) for name in part.__slots__]
    tracker.book(BATCH, (value for value in given if isinstance(value, Tensor)))
    tracker.book(BATCH, (*batch.global_views, *batch.local_views, *batch.columns.values()))


def _name_parts(tracker: TensorTracker, objective: MutualInformation) -> None:
    """Tell what is allocated in modules that the loss calls, and gradients when they are done."""
    named: list[tuple[str, nn.Module]] = [(DECODER, m) for m in objective.decoders.values()]
    named += [(DECODER, module) for module in _captioners(objective)]
    named += [(TEXT, term.text_encoder) for term in objective.terms_of(Caption)]
    for part, module in named:
        module.register_forward_pre_hook(lambda *_, part=part: setattr(tracker, "part", part))
        module.register_forward_hook(lambda *_: setattr(tracker, "part", HEADS))
    for parameter in objective.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p: tracker.book(GRADIENTS, [p.grad])
            )


def _count_graphs(objective: nn.Module) -> list[int]:
    """Return a list that gets, for each call of a step that is replayed, the bytes it keeps."""
    graphs: list[int] = []

    def counted(method: Callable[..., Tensor], module: nn.Module) -> Callable[..., Tensor]:
        def call(*arguments: Tensor | None) -> Tensor:
            output = method(*arguments)
            inputs = [x for x in arguments if x is not None]
            kept = [*inputs, output]
            if output.requires_grad:
                trained = [p for p in module.parameters() if p.requires_grad]
                kept += [output, *trained, *(x for x in inputs if x.requires_grad)]
            graphs.append(sum(tensor.nbytes for tensor in kept))
            return output

        return call

    for module in objective.modules():
        if (name := REPLAYED.get(type(module))) is not None:
            module.calls_apart = True  # type: ignore[assignment]
            setattr(module, name, counted(getattr(module, name), module))
    return graphs


def _widen_norms(objective: nn.Module) -> None:
    """CUDA's autocast computes layer norms in fp32 and returns fp32; the CPU's does not."""

    def widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not torch.is_autocast_enabled("cpu"):
            return args
        return args[0].float(), *args[1:]

    for module in objective.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(widen)


class _StepOfMix(TrainStep):
    """A training step whose mix is given: a draw reads values, which fake tensors have none of.

    Attention is fused, as on a GPU, unless the config asks for plain products.
    """

    mix: Mix

    @contextmanager
    def matrix_products(self) -> Iterator[None]:
        vision = self.cfg.vision
        plain = isinstance(vision, ViTConfig) and vision.attention == "math"
        with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
            yield

    def draw_mix(self, batch: AnyBatch) -> Mix:
        return self.mix


def _arithmetic(bf16: bool) -> Arithmetic:
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Arithmetic(recipe="bf16" if bf16 else "fp32", backend="torch", compute_dtype=dtype)


class _Stages:
    """Reads the tracker where a stage of the step begins or ends."""

    PARTS = {"fwd.target": TARGET, "fwd.input": ENCODER, "optim": STATES}

    def __init__(self, tracker: TensorTracker) -> None:
        self._tracker = tracker
        self._activations: dict[str, int] = {}
        self._gradients = 0
        self._peaks: list[dict[str, int]] = []  # of forward and backward pass: all, sharded

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Stand for a `StageTimer.stage` of the step."""
        tracker = self._tracker
        if name == "bwd":
            self._activations = {
                part: size
                for part, size in tracker.bytes.items()
                if part not in (*HELD, TEACHER, OTHER) and size
            }
        part = HEADS if name.startswith("loss.") else self.PARTS.get(name, tracker.part)
        with tracker.within(part):
            yield
        if name == "bwd":
            self._gradients = tracker.bytes[GRADIENTS]
            self._peaks = [tracker.peak, tracker.sharded_peak]
            tracker.reset_peak()

    def footprint(self, gathers: Mapping[str, int], *, keeps_activations: bool) -> Footprint:
        """Return the bytes of the step that has been taken.

        keeps_activations: what replayed modules saved is there after the backward pass, too.
        """
        tracker = self._tracker
        states = tracker.bytes[STATES]
        # From the second step on the states are there all the time.
        early = [peak | {STATES: states} for peak in self._peaks]
        kept = {}
        if keeps_activations:
            kept = {name: self._activations.get(name, 0) for name in (ENCODER, TEXT, DECODER)}
        late = tracker.peak | kept, tracker.sharded_peak | kept
        peak, sharded_peak = (max(*both, key=_sum) for both in zip(early, late, strict=True))
        # Where gradients are sharded the peak is that of the rest, beside which they all are.
        ddp_peak = max(early[1] | {GRADIENTS: self._gradients}, late[0], key=_sum)
        return Footprint(
            held={name: tracker.bytes[name] for name in HELD},
            activations=self._activations,
            gradients=self._gradients,
            peak=peak,
            sharded_peak=sharded_peak,
            ddp_peak=ddp_peak,
            gathers=dict(gathers),
        )


def _sum(peak: Mapping[str, int]) -> int:
    return sum(peak.values())
