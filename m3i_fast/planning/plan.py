"""What a run needs and how fast it can be, from its config alone: nothing is run or allocated.

FLOPs and traffic are closed forms, memory is that of the real step on tensors without data
(`rank_memory`), times are `roofline`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.flops import Flops
from m3i_fast.costs import loader_cost as loading
from m3i_fast.costs import traffic
from m3i_fast.costs.gemm_shapes import FP8, LegalBatch, legal_batches, token_rows
from m3i_fast.costs.gpus import UTILISATION, Card
from m3i_fast.costs.loader_cost import (
    BUCKET_BYTE_S,
    DRIVES,
    FOLDER_BYTE_S,
    PORT,
    LoaderCost,
    Source,
)
from m3i_fast.costs.roofline import (
    AVERAGE_BYTES,
    CANDIDATES,
    OPTIMISER_BYTES,
    PredictedSpeed,
    StepCost,
    assumptions,
    predict,
)
from m3i_fast.costs.step_flops import counts_of, step_flops, without_sampling
from m3i_fast.costs.traffic import Collective, Nodes, Traffic
from m3i_fast.costs.view_cost import PICTURE
from m3i_fast.engine.parallel.accumulation import needs_whole_batch
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms.views import Embedding
from m3i_fast.pipelines.storage.objects import url_of
from m3i_fast.planning import rank_memory
from m3i_fast.planning.rank_memory import Memory, memory_of
from m3i_fast.planning.sharded_units import count_scalars, units_of
from m3i_fast.planning.step_memory import (
    AVERAGE,
    FROZEN,
    PARAMETERS,
    Footprint,
    build_on_meta,
    count_parameters,
    largest_batch,
    trace,
    trained,
)

PREDICTIONS = "strategies and footprint: computed from the config, run on no card"


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """One way to share the work among ranks."""

    name: str
    memory: Memory
    collectives: Mapping[str, list[Collective]]
    """By what is sent; all of a step but the statistics that losses and batch norms add up."""
    sent: Mapping[str, Traffic]
    speed: PredictedSpeed


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    card: Card
    nodes: Nodes
    batch_size: int
    """Of a rank; of a budget of tokens the mean."""
    most_samples: int | None
    """Samples of a rank's largest batch, of which memory is told; None where all are equal."""
    accumulate: int
    """Batches of a rank in a step."""
    max_tokens: int | None
    """Tokens that a rank's batch may have; None for batches of so many samples."""
    precision: str
    """As the config asks for it; figures are of bf16 or fp32."""
    bf16: bool
    refusals: list[str]
    """Why `m3i-fast train` would refuse the run, with the flags to change."""
    own: str
    """Name of the strategy that the config asks for."""
    parameters: Mapping[str, int]
    flops: Mapping[str, Flops]
    """Of a rank's step, by part."""
    tokens: Mapping[str, int]
    """Of a rank's step, by pass."""
    footprint: Footprint
    legal: list[LegalBatch]
    strategies: list[Strategy]
    loader: LoaderCost
    """Of a rank."""
    assumptions: list[str]

    @property
    def asked_images_s(self) -> float:
        """Source images a second that a rank trains on where the loader keeps up."""
        return self.batch_size / self.chosen.speed.step_s

    @property
    def chosen(self) -> Strategy:
        """Return the config's own strategy, or where it does not fit the fastest that does."""
        own = next(one for one in self.strategies if one.name == self.own)
        fitting = [one for one in self.strategies if one.memory.fits is not False]
        if own in fitting or not fitting:
            return own
        return min(fitting, key=lambda one: one.speed.step_s)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.nodes.num_ranks * self.accumulate

    @property
    def work(self) -> Flops:
        """Of a rank's step, but for the sampling of DCNv3."""
        return without_sampling(self.flops)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and properties, for JSON."""
        content = asdict(self) | {"predictions": PREDICTIONS}
        content |= {"global_batch": self.global_batch, "flops_total": asdict(self.work)}
        content["model_flops_per_image"] = self.work.model / self.batch_size
        content["hardware_flops_per_image"] = self.work.hardware / self.batch_size
        content["asked_images_s"] = self.asked_images_s
        content["loader"]["images_s"] = self.loader.images_s
        for shown, strategy in zip(content["strategies"], self.strategies, strict=True):
            shown["memory"] |= {"total": strategy.memory.total, "fits": strategy.memory.fits}
        return content


def make_plan(
    cfg: TrainConfig,
    *,
    card: Card,
    nodes: Nodes,
    utilisation: float = UTILISATION,
    source: Source | None = None,
    cores: float | None = None,
) -> Plan:
    """Return the plan of `cfg`, whose batch is a rank's, on this many of these cards.

    source: the stored pictures; None: `source_of`'s. cores: of the node, for a rank; None: the
    card's.

    Raises ValueError where the config is not enough: a term with a frozen teacher.
    """
    bf16 = in_bf16(cfg, card)
    objective = build_on_meta(cfg)
    parameters = count_parameters(objective)
    more = [_FP8_RATE] if cfg.precision in FP8 else []
    if (count := cfg.parallel.accumulate) > 1:
        more.append(_ONE_OF_SEVERAL.format(count))
    counts = counts_of(cfg, num_ranks=nodes.num_ranks)
    most = None
    if cfg.data.any_shape:
        most = largest_batch(cfg).data.batch_size
        more += _OF_ANY_SHAPE
    footprint = trace(cfg, bf16=bf16, cuda=card.is_gpu, num_shards=nodes.num_ranks)
    on_card = {"bf16": bf16, "on_gpu": card.is_gpu}
    flops = step_flops(cfg, num_ranks=nodes.num_ranks)
    source, cores = source or source_of(cfg, card, nodes), cores or card.cores
    loader = loading.loader_cost(cfg.data, card, source, cores=cores, local_ranks=nodes.local)
    strategies = []
    for name, shards in layouts(cfg, nodes).items():
        traced = footprint
        if 1 < shards < nodes.num_ranks:
            traced = trace(cfg, bf16=bf16, cuda=card.is_gpu, num_shards=shards)
        memory = memory_of(cfg, card, nodes, traced, objective, num_shards=shards, bf16=bf16)
        collectives = collectives_of(
            cfg, nodes, objective, footprint.gathers, num_shards=shards, **on_card
        )
        sent = {what: traffic.total(calls) for what, calls in collectives.items()}
        cost = StepCost(
            batch_size=counts.batch_size,
            flops=flops,
            bf16=bf16,
            moved_bytes=_moved(footprint, parameters, shards=shards),
            sent=sent,
            loader_images_s=loader.images_s,
            loader_bound=loader.bound,
        )
        speed = predict(cost, card, num_ranks=nodes.num_ranks, utilisation=utilisation)
        strategies.append(
            Strategy(name=name, memory=memory, collectives=collectives, sent=sent, speed=speed)
        )
    return Plan(
        card=card,
        nodes=nodes,
        batch_size=counts.batch_size,
        most_samples=most,
        accumulate=cfg.parallel.accumulate,
        max_tokens=cfg.data.max_tokens_per_batch or None,
        precision=cfg.precision,
        bf16=bf16,
        refusals=refusals_of(cfg, card, nodes),
        own=own_layout(cfg, nodes),
        parameters=parameters,
        flops=flops,
        tokens=token_rows(counts_of(cfg)),
        footprint=footprint,
        legal=[] if cfg.data.any_shape else legal_batches(cfg),
        strategies=strategies,
        loader=loader,
        assumptions=[
            *rank_memory.ASSUMPTIONS,
            _SENT,
            *assumptions(card, utilisation=utilisation),
            *loading.assumptions(cfg.data, card, source, cores),
            *more,
        ],
    )


def source_of(
    cfg: TrainConfig,
    card: Card,
    nodes: Nodes,
    *,
    picture: tuple[int, int] = PICTURE,
    kilobytes: float | None = None,
) -> Source:
    """Return pictures of a height and width, read from folders and buckets as the config says.

    Those of a mixture are read side by side, by their weights.
    """
    parts = [(part.path, part.weight) for part in cfg.data.mixture_parts] or [(cfg.data.path, 1.0)]
    whole = sum(weight for _, weight in parts)
    remote = sum(weight for path, weight in parts if url_of(path) is not None) / whole
    bucket_byte_s = min(BUCKET_BYTE_S, nodes.local * card.network_byte_s)
    kinds = [(FOLDER_BYTE_S, 1 - remote, DRIVES), (bucket_byte_s, remote, PORT)]
    read_byte_s, read_as = min((rate / share, what) for rate, share, what in kinds if share > 0)
    if 0 < remote < 1:
        read_as += f", which has {remote if read_as == PORT else 1 - remote:.0%} of the pictures"
    return Source(
        height=picture[0],
        width=picture[1],
        kilobytes=kilobytes,
        read_byte_s=read_byte_s,
        read_as=read_as,
    )


def refusals_of(cfg: TrainConfig, card: Card, nodes: Nodes) -> list[str]:
    """Return why `m3i-fast train` would refuse the run on these cards, with what to change."""
    refusals = []
    if cfg.parallel.shard > 1 and nodes.num_ranks % cfg.parallel.shard:
        refusals.append(
            f"parallel.shard: expected a divisor of the {nodes.num_ranks} ranks, got "
            f"{cfg.parallel.shard}"
        )
    if cfg.parallel.accumulate > 1 and (reason := needs_whole_batch(cfg)):
        refusals.append(f"parallel.accumulate: expected 1 with {reason}")
    if cfg.precision in FP8 and card.is_gpu:
        if cfg.precision not in card.formats:
            computed = ", ".join(("bf16", *card.formats))
            refusals.append(
                f"precision: {card.name} computes {computed}, expected one of these, got "
                f"{cfg.precision}"
            )
        wrong = [] if cfg.data.any_shape else legal_batches(cfg)
        refusals += [
            f"data.batch_size: not legal for {row.recipe}: {row.reason}"
            for row in wrong
            if row.recipe == cfg.precision and not row.is_legal
        ]
    return refusals


_ONE_OF_SEVERAL = (
    "parallel.accumulate: all is of one of the {} batches of a step, as if it were a step"
)
_OF_ANY_SHAPE = [
    "operations, traffic and times are of the mean batch, every size of view as likely as every "
    "other and each with all the patches that it may have: rounding to whole rows and columns "
    "leaves about a tenth of them out",
    "memory is of the largest batch, that of the smallest views alone: all tokens of the budget, "
    "and the most pictures",
]
_FP8_RATE = "products in FP8 run at the rate of bf16: what they gain is not predicted"
_SENT = "sent: all but the statistics that losses, batch norms and the guard add up over ranks"


def in_bf16(cfg: TrainConfig, card: Card) -> bool:
    """Whether matrix products that are not in FP8 run in bf16."""
    return cfg.precision != "fp32" and (cfg.precision != "auto" or card.is_gpu)


def own_layout(cfg: TrainConfig, nodes: Nodes) -> str:
    """Return the name of the strategy that the config asks for."""
    if nodes.num_ranks == 1:
        return "alone"
    if cfg.parallel.shard == 1:
        return "ddp"
    return "hsdp" if 1 < cfg.parallel.shard < nodes.num_ranks else "fsdp"


def layouts(cfg: TrainConfig, nodes: Nodes) -> dict[str, int]:
    """Return the ranks that weights are sharded over, by strategy.

    DDP and FSDP over all ranks, and the config's own where `parallel.shard` is between: HSDP.
    """
    if nodes.num_ranks == 1:
        return {"alone": 1}
    own = {"hsdp": cfg.parallel.shard} if 1 < cfg.parallel.shard < nodes.num_ranks else {}
    return {"ddp": 1, "fsdp": nodes.num_ranks, **own}


def collectives_of(
    cfg: TrainConfig,
    nodes: Nodes,
    objective: MutualInformation,
    gathers: Mapping[str, int],
    *,
    num_shards: int,
    bf16: bool,
    on_gpu: bool,
) -> dict[str, list[Collective]]:
    """Return what a rank sends in a step, by kind, but for statistics of losses and batch norms.

    objective: on the meta device. gathers: of each of its blocks, as the footprint has them.
    """
    weight_bytes = 2 if bf16 else 4
    if num_shards > 1:
        of_weights = traffic.fsdp(
            nodes,
            units_of(objective, gathers, num_shards=num_shards, weight_bytes=weight_bytes),
            num_shards=num_shards,
            num_scalars=count_scalars(objective),
        )
        collectives = {"weights and gradients": of_weights}
    else:
        num_trained = trained(count_parameters(objective))
        collectives = {"gradients": traffic.ddp(nodes, num_parameters=num_trained)}
    counts, of_rows = counts_of(cfg), list[Collective]()
    if cfg.objective.uses(target="caption"):
        of_rows += traffic.candidates(
            nodes,
            num_rows=counts.batch_size,
            dim=cfg.text.embed_dim,
            weight_bytes=weight_bytes,
            sigmoid=cfg.objective.uses(target="caption", likelihood="sigmoid"),
            on_gpu=on_gpu,
        )
    for module in objective.terms_of(Embedding):
        rows, dim = counts.num_images, module.dim
        if module.term.regulariser == "all_views":
            of_rows += traffic.views_of_ranks(nodes, num_rows=rows, dim=dim)
        elif module.term.regulariser == "negatives":
            of_call = traffic.candidates(
                nodes,
                num_rows=rows,
                dim=dim,
                weight_bytes=4,
                target_grad=module.term.encoder == "shared",
                on_gpu=on_gpu,
            )
            of_rows += of_call * (1 + module.term.symmetric)
    return collectives | ({CANDIDATES: of_rows} if of_rows else {})


def _moved(footprint: Footprint, parameters: Mapping[str, int], *, shards: int) -> float:
    """Return the bytes moved: of activations, weights and the optimiser's share.

    Activations go out and in, weights in twice, frozen ones once.
    """
    activations = sum(footprint.activations.values())
    weights = 2 * footprint.held[PARAMETERS] + footprint.held[FROZEN]
    updated = OPTIMISER_BYTES * trained(parameters) + AVERAGE_BYTES * parameters[AVERAGE]
    return 2 * activations + weights + updated / shards
