"""A step on more GPUs than were measured: a model fitted to what was. All of it is prediction.

    step(n) = compute(n) + candidates(n) + max(gradients(n) - backward(n), 0)

`compute` is a fixed part and one that grows as a rank's matrix products, which change with n where
the batch does or where a term meets the rows of all ranks; it is fitted to ranks that step by
themselves. What is sent takes `hops * latency + slowdown * bytes / published rate`, the bytes those
of `costs/traffic`, latency and slowdown fitted to all-reduces that were timed by themselves.
Gradients go as rings, within nodes and then between them, while the backward pass lasts, as
`costs/roofline` has it; candidates of a likelihood over all pairs go in the forward pass.

Between nodes the published rate of the adapter is slowed as much as what was measured within one:
an assumption, as is that every rank has a card of its own and all are equally fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.flops import Flops
from m3i_fast.costs.gpus import Card
from m3i_fast.costs.roofline import CANDIDATES
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.costs.traffic import Nodes, Traffic, all_reduce, total
from m3i_fast.planning.plan import collectives_of, in_bf16
from m3i_fast.planning.step_memory import build_on_meta, trace, trained

BUCKET_BYTES = 25 * 2**20  # of DDP's gradients; its first is 1 MiB
FIRST_BUCKET_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What one rank of a number of ranks does and sends in a step."""

    nodes: Nodes
    batch_size: int
    """Of a rank."""
    products: Flops
    gradients: Traffic = Traffic()
    """And weights, where they are spread."""
    num_collectives: int = 0
    """That gradients are sent by."""
    candidates: Traffic = Traffic()
    candidate_hops: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """The measurements on one number of ranks."""

    workload: Workload
    alone_s: float
    """A step of as many ranks that have nothing to do with one another."""
    step_s: float
    all_reduces: tuple[tuple[int, float], ...] = ()
    """Bytes and seconds of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The fitted constants of a step."""

    fixed_s: float
    """Of a step, whatever its batch."""
    s_per_flop: float
    """Of matrix products, recomputed ones included."""
    latency_s: float
    """Of a hop from a rank to the next."""
    slowdown: float
    """Times that sending takes what it would at the published rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A predicted step, in seconds."""

    compute_s: float
    backward_s: float
    candidates_s: float
    gradients_s: float
    """Exposed or not."""

    @property
    def exposed_s(self) -> float:
        """Return the seconds of communication that no computation hides."""
        return self.candidates_s + max(self.gradients_s - self.backward_s, 0.0)

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s


def workload(cfg: TrainConfig, card: Card, nodes: Nodes, parameters: Mapping[str, int]) -> Workload:
    """Of `cfg`, whose batch is a rank's; `parameters` as `count_parameters` gives them.

    Any split of weights counts as FSDP over all ranks.
    """
    several, bf16 = nodes.num_ranks > 1, in_bf16(cfg, card)
    sharded = several and cfg.parallel.shard != 1
    collectives = collectives_of(
        cfg,
        nodes,
        build_on_meta(cfg),
        trace(cfg, bf16=bf16, cuda=card.is_gpu).gathers if sharded else {},
        num_shards=nodes.num_ranks if sharded else 1,
        bf16=bf16,
        on_gpu=card.is_gpu,
    )
    sent = {what: total(calls) for what, calls in collectives.items()}
    others = [value for name, value in sent.items() if name != CANDIDATES]
    # Gradients travel one hop behind the rows, at the same time.
    hops = collectives[CANDIDATES][0].count + 1 if CANDIDATES in collectives else 0
    return Workload(
        nodes=nodes,
        batch_size=cfg.data.batch_size,
        products=without_sampling(step_flops(cfg, num_ranks=nodes.num_ranks)),
        gradients=sum(others, start=Traffic()),
        num_collectives=num_buckets(4 * trained(parameters)) if several else 0,
        candidates=sent.get(CANDIDATES, Traffic()),
        candidate_hops=hops if several else 0,
    )


def num_buckets(num_bytes: int) -> int:
    """Return the number of all-reduces that DDP makes of gradients of so many bytes."""
    return 1 + math.ceil(max(num_bytes - FIRST_BUCKET_BYTES, 0) / BUCKET_BYTES)


def ring_hops(nodes: Nodes) -> int:
    """Return the hops of one all-reduce as a ring, within nodes and between them."""
    return 2 * (nodes.local - 1 + nodes.count - 1)


# ---- Prediction ----------------------------------------------------------------------------------


def predict(model: Model, work: Workload, card: Card) -> Step:
    """Predict a step of each of `work`'s ranks."""
    sending = model.slowdown * _seconds(work.gradients, card)
    hops = work.num_collectives * ring_hops(work.nodes)
    candidates = model.slowdown * _seconds(work.candidates, card)
    return Step(
        compute_s=model.fixed_s + model.s_per_flop * work.products.hardware,
        backward_s=model.s_per_flop * (work.products.hardware - work.products.forward),
        candidates_s=candidates + work.candidate_hops * model.latency_s,
        gradients_s=sending + hops * model.latency_s,
    )


def _seconds(sent: Traffic, card: Card) -> float:
    """At the published rates."""
    return max(sent.nvlink / card.nvlink_byte_s, sent.network / card.network_byte_s)


# ---- Fit -----------------------------------------------------------------------------------------


def fit(observations: Sequence[Observation], card: Card) -> Model:
    """Fit the model to observations, one of which is of one rank.

    With one size of batch the fixed part cannot be told and is 0, without an all-reduce what
    sending costs is that of the published rates. ValueError without an observation of one rank.
    """
    if not any(o.workload.nodes.num_ranks == 1 for o in observations):
        raise ValueError("gpus: expected 1 among them, which all others are compared with")
    steps = [(1.0, float(o.workload.products.hardware), o.alone_s) for o in observations]
    fixed_s, s_per_flop = _two_shares(_one_of_each(steps))
    sent = [
        (float(ring_hops(o.workload.nodes)), _all_reduce_s(o.workload.nodes, size, card), seconds)
        for o in observations
        for size, seconds in o.all_reduces
    ]
    latency_s, slowdown = _two_shares(sent) if sent else (0.0, 1.0)
    return Model(fixed_s=fixed_s, s_per_flop=s_per_flop, latency_s=latency_s, slowdown=slowdown)


def _one_of_each(
    steps: Sequence[tuple[float, float, float]],
) -> list[tuple[float, float, float]]:
    """Where all ranks do the same work nothing tells a fixed part: it is left out."""
    least, most = min(s[1] for s in steps), max(s[1] for s in steps)
    return list(steps) if most > 1.2 * least else [(0.0, flops, s) for _, flops, s in steps]


def _all_reduce_s(nodes: Nodes, size: int, card: Card) -> float:
    return _seconds(all_reduce(nodes, size), card)


def _two_shares(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """x, y >= 0 with a x + b y = t for rows of (a, b, t), by least squares of relative errors."""
    scaled = [(a / t, b / t) for a, b, t in rows]
    aa, ab, bb = (sum(r[i] * r[j] for r in scaled) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(r[i] for r in scaled) for i in (0, 1))
    candidates = [(a / aa if aa else 0.0, 0.0), (0.0, b / bb if bb else 0.0)]
    determinant = aa * bb - ab * ab
    if determinant > 1e-9 * aa * bb:
        x, y = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if x >= 0 and y >= 0:
            return x, y
    return min(candidates, key=lambda xy: sum((p * xy[0] + q * xy[1] - 1) ** 2 for p, q in scaled))


def leave_one_out(observations: Sequence[Observation], card: Card) -> list[float | None]:
    """Return each observation's (predicted - measured) / measured, fitted to all others.

    None of one rank, without which there is no model. From one rank alone steps are predicted by
    the published rates.
    """
    errors: list[float | None] = []
    for left in observations:
        count = left.workload.nodes.num_ranks
        others = [o for o in observations if o.workload.nodes.num_ranks != count]
        if count == 1:
            errors.append(None)
        else:
            predicted = predict(fit(others, card), left.workload, card).step_s
            errors.append(predicted / left.step_s - 1)
    return errors


# ---- Curves --------------------------------------------------------------------------------------


def predicted_points(
    model: Model,
    work_of: Callable[[int], Workload],
    card: Card,
    counts: Sequence[int],
) -> list[dict[str, float]]:
    """Return images/s, efficiency and parts of the step, predicted for each count."""
    first = work_of(1)
    one = first.batch_size / predict(model, first, card).step_s  # images/s
    points = []
    for count in counts:
        work = work_of(count)
        step = predict(model, work, card)
        images_s = count * work.batch_size / step.step_s
        points.append(
            {
                "ranks": count,
                "batch_per_rank": work.batch_size,
                "step_ms": 1e3 * step.step_s,
                "compute_ms": 1e3 * step.compute_s,
                "exposed_ms": 1e3 * step.exposed_s,
                "images_s": images_s,
                "efficiency": images_s / (count * one),
            }
        )
    return points
