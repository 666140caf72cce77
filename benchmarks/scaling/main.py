"""How training scales with the number of GPUs: measured on this machine, predicted beyond it.

    m3i-fast bench scaling RECIPE [--gpus 1,2,4,8] [--mode weak|strong|both] [--field value ...]

Ranks are started here, one for a GPU or, without any, gloo processes of one thread, and take the
trainer's own steps on noise that lies on the device (`scaling_ranks`). Weak: every rank has the
recipe's batch. Strong: all ranks share `--global-batch`, the recipe's unless given.

    E(n)           T(n) / (n T(1)), T the images/s of all ranks; 95 % intervals by bootstrap
    serial         Karp and Flatt's serial fraction of the speed-up n E(n)
    communication  1 - alone / together: what a step takes longer than that of as many busy ranks
                   that have nothing to do with each other. It holds what is sent, waiting for the
                   slowest, and the work of terms whose rows meet those of other ranks
    reduction      1 - unreduced / together: the same step without DDP's reduction of gradients,
                   that is, of it what the backward pass does not hide

Where processes outnumber the cores, E says how they share cores and nothing about a network. Lines
marked * are predictions of a model fitted to the others (`scaling_model`), measured by nobody.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from m3i_fast.benchmarks.core.harness import parse_counts
from m3i_fast.benchmarks.core.rate_statistics import summarise_rates
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.scaling.config import Config, Mode, find_card, parse
from m3i_fast.benchmarks.scaling.figures import efficiency, serial_fraction, share_lost
from m3i_fast.benchmarks.scaling.model import (
    Observation,
    Workload,
    fit,
    leave_one_out,
    predicted_points,
    workload,
)
from m3i_fast.benchmarks.scaling.plot import draw
from m3i_fast.benchmarks.scaling.ranks import Job, RankResult, all_reduces, slowest, start
from m3i_fast.benchmarks.scaling.table import MEASURED, PREDICTED, table
from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import Card
from m3i_fast.costs.traffic import Nodes
from m3i_fast.durable_files import write_atomically
from m3i_fast.observe.environment import environment
from m3i_fast.planning.step_memory import build_on_meta, count_parameters
from m3i_fast.terminal import make_console

logger = logging.getLogger(__name__)

SUBJECT = "scaling"
console = make_console()


# ---- Measured ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the rows of one command share."""

    cfg: Config
    card: Card
    num_cores: int

    @property
    def common(self) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "recipe": cfg.recipe,
            "device": "cuda" if cfg.cuda else "cpu",
            "card": self.card.name,
            "num_threads": torch.get_num_threads() if cfg.cuda else 1,
            "shard": cfg.config.parallel.shard,
        }

    def shares_cores(self, num_ranks: int) -> bool:
        return not self.cfg.cuda and num_ranks > self.num_cores


def measured_row(
    setting: Setting, mode: Mode, work: Workload, results: list[RankResult], one: list[RankResult]
) -> dict[str, Any]:
    """Return the row of the ranks that were started, compared with one rank."""
    cfg, num_ranks, batch = setting.cfg, len(results), work.batch_size
    together, alone = slowest(results, "together"), slowest(results, "alone")
    unreduced = slowest(results, "unreduced")
    rates = [num_ranks * batch / seconds for seconds in together]
    # Of one rank the batch is that of weak scaling, or that of all ranks.
    one_batch = batch if mode == "weak" else num_ranks * batch
    of_one = [one_batch / seconds for seconds in slowest(one, "together")]
    scaled = efficiency(rates, of_one, num_ranks=num_ranks)
    several = num_ranks > 1
    own_ms = [1e3 * summarise_rates(f.step_s["alone"]).median for f in results]
    return {
        "kind": MEASURED,
        "mode": mode,
        **setting.common,
        "ranks": num_ranks,
        "batch_per_rank": batch,
        "shares_cores": setting.shares_cores(num_ranks),
        "steps_a_window": cfg.window_steps,
        "images_s": asdict(summarise_rates(rates)),
        "step_ms": {
            kind: asdict(summarise_rates([1e3 * s for s in seconds]))
            for kind, seconds in {
                "together": together,
                "alone": alone,
                "unreduced": unreduced,
            }.items()
            if seconds
        },
        "efficiency": asdict(scaled),
        "karp_flatt": {"serial_fraction": serial_fraction(scaled.value, num_ranks)},
        "communication_share": asdict(share_lost(together, alone)) if several else None,
        "reduction_share": asdict(share_lost(together, unreduced)) if unreduced else None,
        "model_flops": min((f.efficiency for f in results), key=lambda of_rank: of_rank["mfu"]),
        "ranks_alone": {"step_ms": own_ms, "spread": (max(own_ms) - min(own_ms)) / min(own_ms)},
        "stages_ms_by_rank": [f.stages_ms for f in results],
        "all_reduce_s": {
            str(size): asdict(summarise_rates(seconds))
            for size, seconds in all_reduces(results).items()
        },
        "loss": [f.loss for f in results],
    }


def observe(work: Workload, results: list[RankResult]) -> Observation:
    """Return the medians that the model is fitted to."""
    return Observation(
        workload=work,
        alone_s=summarise_rates(slowest(results, "alone")).median,
        step_s=summarise_rates(slowest(results, "together")).median,
        all_reduces=tuple(
            (size, summarise_rates(seconds).median)
            for size, seconds in all_reduces(results).items()
        ),
    )


# ---- All rows ------------------------------------------------------------------------------------


Telemetry = Mapping[str, Any] | None


def rows_of(cfg: Config) -> Iterator[tuple[dict[str, Any], TrainConfig, Telemetry]]:
    """Each number of ranks in each mode, then a prediction for each mode, of which is none."""
    counts = cfg.counts
    cfg.expect_divisible(counts)
    setting = Setting(cfg=cfg, card=find_card(cfg), num_cores=environment().num_cores)
    parameters = count_parameters(build_on_meta(cfg.config))
    started: dict[tuple[int, int], tuple[list[RankResult], dict[str, Any]]] = {}
    observed: list[tuple[Mode, Observation]] = []

    def work_of(mode: Mode, count: int) -> Workload:
        nodes = Nodes(count, cfg.gpus_per_node)
        return workload(cfg.of_ranks(mode, count), setting.card, nodes, parameters)

    for mode in cfg.modes:
        for count in counts:
            work, train = work_of(mode, count), cfg.of_ranks(mode, count)
            key = count, work.batch_size
            if key not in started:
                logger.info("%d ranks with a batch of %d each", *key)
                started[key] = start(
                    Job(
                        config=train,
                        num_ranks=count,
                        cuda=cfg.cuda,
                        windows=cfg.windows,
                        steps=cfg.window_steps,
                        warmup_steps=cfg.warmup_steps,
                    )
                )
            together, telemetry = started[key]
            one, _ = started[1, work_of(mode, 1).batch_size]
            if not setting.shares_cores(count):
                observed.append((mode, observe(work, together)))
            yield measured_row(setting, mode, work, together, one), train, telemetry
    for mode in cfg.modes:
        yield predicted_row(setting, mode, observed, work_of), cfg.of_ranks(mode, 1), None


def predicted_row(
    setting: Setting,
    mode: Mode,
    observed: list[tuple[Mode, Observation]],
    work_of: Callable[[Mode, int], Workload],
) -> dict[str, Any]:
    """Return what the model predicts of more ranks, and its errors on measured ones."""
    observations = [observation for _, observation in observed]
    model = fit(observations, setting.card)
    errors = leave_one_out(observations, setting.card)
    multiple = setting.cfg.config.objective.mixing.images_per_input
    whole = work_of(mode, 1).batch_size
    counts = parse_counts(setting.cfg.predict, "--predict")
    if mode == "strong":  # a rank has at least an input
        counts = [count for count in counts if whole % (count * multiple) == 0]
    return {
        "kind": PREDICTED,
        "mode": mode,
        **setting.common,
        "gpus_per_node": setting.cfg.gpus_per_node,
        "model": asdict(model),
        "fitted_to_ranks": [o.workload.nodes.num_ranks for o in observations],
        "leave_one_out_error": {
            str(o.workload.nodes.num_ranks): error
            for (of_mode, o), error in zip(observed, errors, strict=True)
            if of_mode == mode and error is not None
        },
        "points": predicted_points(model, lambda n: work_of(mode, n), setting.card, counts),
    }


def main(argv: list[str] | None = None) -> None:
    cfg = parse(sys.argv[1:] if argv is None else argv)
    rows = []
    for figures, config, telemetry in rows_of(cfg):
        rows.append(figures)
        if cfg.record:
            ledger.append_row(SUBJECT, figures, config=config, telemetry=telemetry)
    console.print(table(rows))
    if cfg.record:
        picture = ledger.results_dir() / f"{SUBJECT}.svg"
        write_atomically(picture, draw(list(ledger.read_rows(SUBJECT))).encode())
        console.print(f"{len(rows)} rows appended, drawn in {picture}", soft_wrap=True)
