"""m3i-fast plan RECIPE --gpus N --card NAME: what a run needs and how fast it can be."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.table import Table
from rich.text import Text

from m3i_fast.cli import show_usage
from m3i_fast.config import TrainConfig
from m3i_fast.costs.gpus import CARDS, UTILISATION, Card
from m3i_fast.costs.loader_cost import ENGINES, READING, THREADS, VIEWS
from m3i_fast.costs.traffic import Nodes
from m3i_fast.costs.view_cost import PICTURE
from m3i_fast.did_you_mean import nearest
from m3i_fast.flags import own_help, read_flags
from m3i_fast.recipes import find_recipe
from m3i_fast.recipes.catalogue import typed_recipe
from m3i_fast.terminal import make_console

if TYPE_CHECKING:  # torch takes seconds: help and refusals come before it
    from m3i_fast.planning.plan import Plan

USAGE = """\
usage: m3i-fast plan RECIPE --gpus N --card NAME [--gpus-per-node 8] [--global-batch N] [--json]
                     [--utilisation 0.4] [--picture 375 500] [--picture-kb 110] [--cores 14]
                     [--read-gb-s 25] [--field value ...]
       m3i-fast plan --config FILE [...]
"""
GIB, MIB = 2**30, 2**20
HFU_HAS = "with what is computed again"
_PREDICTED = (
    "All below is computed from the config; times and memory are predictions, and no card has run "
    "them."
)


@dataclass(frozen=True, kw_only=True)
class PlanCommand:
    """Say what a run needs and how fast it can be, from its config: nothing is run."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    gpus: int = 1
    """Ranks, one GPU each."""
    card: str = "h100"
    """a100, h100, h200, b200 (SXM), a100_40gb, a100_pcie, h100_pcie, h100_nvl, h200_nvl, or cpu."""
    gpus_per_node: int = 8
    """GPUs that NVLink connects."""
    global_batch: int | None = None
    """Images a step of all ranks, in the place of data.batch_size of each."""
    utilisation: float = UTILISATION
    """Assumed share of the card's published rate that matrix products reach."""
    picture: tuple[int, int] = PICTURE
    """Height and width of the stored pictures."""
    picture_kb: float | None = None
    """Kilobytes of a stored picture; none: 110 at 375 x 500 pixels, in proportion to them."""
    read_gb_s: float | None = None
    """Gigabytes a second that a node reads; none: 25 of a folder, 12.5 of a bucket."""
    cores: float | None = None
    """CPU cores for each GPU; none: those of the maker's node."""
    json: bool = False
    """One JSON object on standard output instead of the tables; bytes, FLOPs, seconds."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        return show_usage(f"{USAGE}\nm3i-fast recipes lists the recipes", asked=bool(argv))
    name, config, rest = find_recipe(argv)
    default = PlanCommand(config=config)
    if {"-h", "--help"} & set(rest):
        return show_usage(own_help("plan", typed_recipe(argv), default), asked=True)
    command = read_flags(
        PlanCommand,
        rest,
        prog=f"m3i-fast plan {typed_recipe(argv)}",
        default=default,
    )
    config, card, nodes = _sized(command), _card(command.card), _nodes(command)
    _expect_positive(command)
    from m3i_fast.planning.plan import make_plan, source_of

    source = source_of(config, card, nodes, picture=command.picture, kilobytes=command.picture_kb)
    if command.read_gb_s is not None:
        source = replace(source, read_byte_s=1e9 * command.read_gb_s, read_as="as given")
    plan = make_plan(
        config,
        card=card,
        nodes=nodes,
        utilisation=command.utilisation,
        source=source,
        cores=command.cores,
    )
    if command.json:
        sys.stdout.write(json.dumps({"recipe": name, **plan.to_dict()}, indent=2) + "\n")
    else:
        show(name, plan)
    return 0


def _card(name: str) -> Card:
    if name not in CARDS:
        raise ValueError(
            f"--card: expected one of {', '.join(CARDS)}, got {name!r}." + nearest(name, CARDS)
        )
    return CARDS[name]


def _nodes(command: PlanCommand) -> Nodes:
    for flag, value in (("gpus", command.gpus), ("gpus-per-node", command.gpus_per_node)):
        if value < 1:
            raise ValueError(f"--{flag}: expected at least 1, got {value}")
    if command.gpus > command.gpus_per_node and command.gpus % command.gpus_per_node:
        raise ValueError(
            f"--gpus: expected a multiple of --gpus-per-node {command.gpus_per_node}, got "
            f"{command.gpus}"
        )
    if not 0 < command.utilisation <= 1:
        raise ValueError(f"--utilisation: expected in (0, 1], got {command.utilisation}")
    return Nodes(command.gpus, command.gpus_per_node)


def _expect_positive(command: PlanCommand) -> None:
    """Raise ValueError for sizes and rates of the loader that cannot be."""
    if min(command.picture) < 1:
        raise ValueError(
            f"--picture: expected a height and a width of 1 and more, got {command.picture}"
        )
    for flag in ("picture_kb", "read_gb_s", "cores"):
        value = getattr(command, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')}: expected more than 0, got {value}")


def _sized(command: PlanCommand) -> TrainConfig:
    """Return the config with the share of --global-batch that a rank has."""
    config = command.config
    if command.global_batch is None:
        return config
    if config.data.any_shape:
        raise ValueError(
            "--global-batch: expected none with data.max_tokens_per_batch, which says how many "
            f"tokens a rank's batch has, got {command.global_batch}: set "
            "--data.max-tokens-per-batch"
        )
    accumulate = config.parallel.accumulate
    batches = command.gpus * accumulate
    if command.global_batch < 1 or command.gpus < 1 or command.global_batch % batches:
        of = f" x --parallel.accumulate {accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"--global-batch: expected a multiple of --gpus {command.gpus}{of}, got "
            f"{command.global_batch}"
        )
    own = command.global_batch // batches
    return replace(config, data=replace(config.data, batch_size=own))


# ---- Tables --------------------------------------------------------------------------------------


def show(name: str, plan: Plan) -> None:
    """Print a plan for people, on standard output."""
    console, nodes = make_console(), plan.nodes
    arithmetic = "bf16" if plan.bf16 else "fp32"
    if plan.precision not in ("auto", arithmetic):
        arithmetic = f"{plan.precision} (operations, memory and times are those of {arithmetic})"
    heading = Text.assemble(
        (name, "bold"),
        f": {nodes.num_ranks} x {plan.card.name}, {nodes.count} nodes, "
        f"{_batch(plan)}, {arithmetic}\n",
        (_PREDICTED, "yellow"),
    )
    console.print(heading)
    for reason in plan.refusals:
        console.print(Text(f"m3i-fast train refuses this run: {reason}", "red"), soft_wrap=True)
    console.print(_flops_table(plan))
    console.print(_totals(plan), highlight=False)
    console.print(_memory_table(plan))
    console.print(
        f"All gradients are {plan.footprint.gradients / GIB:.2f} GiB, activations for the backward "
        f"pass {sum(plan.footprint.activations.values()) / GIB:.2f} GiB a rank.\n",
        highlight=False,
    )
    batches = [_batch_table(plan)] if plan.legal else []
    for table in (*batches, _traffic_table(plan), _loader_table(plan)):
        console.print(table)
    console.print(_speed_table(plan))
    for line in _verdict(plan):
        console.print(line, highlight=False)
    console.print("Assumptions", style="bold")
    for sentence in plan.assumptions:
        console.print(f"- {sentence}", highlight=False)


def _batch(plan: Plan) -> str:
    if plan.max_tokens is None:
        times = f" x {plan.accumulate} batches" if plan.accumulate > 1 else ""
        return f"{plan.batch_size} images a rank{times}, {plan.global_batch:,} a step"
    return (
        f"{plan.max_tokens:,} tokens a rank: {plan.batch_size} images on average, "
        f"{plan.global_batch:,} a step; at most {plan.most_samples}"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    return table


def _flops_table(plan: Plan) -> Table:
    table = _table(
        "A rank's step, in GFLOP an image", "part", "parameters", "forward", "backward", "again"
    )
    scale = 1e9 * plan.batch_size
    for part in dict.fromkeys([*plan.flops, *plan.parameters]):
        size = plan.parameters.get(part)
        if part not in plan.flops and not size:
            continue
        shown = [f"{size / 1e6:.1f} M" if size else ""]
        if part in plan.flops:
            one = plan.flops[part]
            shown += [f"{x / scale:.2f}" for x in (one.forward, one.backward, one.recompute)]
        table.add_row(part, *shown)
    return table


def _totals(plan: Plan) -> str:
    work, scale = plan.work, 1e9 * plan.batch_size
    tokens = ", ".join(f"{part} {count:,}" for part, count in plan.tokens.items())
    return (
        f"model {work.model / scale:.1f} GFLOP an image (MFU), hardware "
        f"{work.hardware / scale:.1f} (HFU, {HFU_HAS}); {work.hardware / 1e12:,.1f} TFLOP a step\n"
        f"tokens a step: {tokens}\n"
    )


def _memory_table(plan: Plan) -> Table:
    names = [strategy.name for strategy in plan.strategies]
    table = _table("Memory of a rank at the step's peak, GiB (prediction)", "part", *names)
    memories = [strategy.memory for strategy in plan.strategies]
    for part in dict.fromkeys(part for memory in memories for part in memory.parts):
        sizes = [memory.parts.get(part, 0.0) for memory in memories]
        if max(sizes) >= MIB:
            table.add_row(part, *(f"{size / GIB:.2f}" for size in sizes))
    for part in memories[0].assumed:
        shown = (f"{memory.assumed[part] / GIB:.2f}" for memory in memories)
        table.add_row(f"{part} (assumed)", *shown)
    table.add_section()
    table.add_row("in all", *(f"{memory.total / GIB:.2f}" for memory in memories))
    if plan.card.memory_bytes is not None:
        words = {True: Text("fits", "green"), False: Text("does not fit", "red"), None: Text()}
        limit = f"{plan.card.name}: {plan.card.memory_bytes / GIB:.1f}"
        table.add_row(limit, *(words[memory.fits] for memory in memories))
    return table


def _batch_table(plan: Plan) -> Table:
    table = _table(
        "Legal batches of a rank", "arithmetic", "tokens a multiple of", "this one", "nearest"
    )
    table.add_column("why", overflow="fold")
    for row in plan.legal:
        nearest_legal = dict.fromkeys(str(x) for x in (row.below, row.above) if x is not None)
        reason = row.reason
        if row.recipe != "bf16" and row.recipe not in plan.card.formats:
            reason = f"{plan.card.name} does not compute it natively" + "; " * bool(reason) + reason
        table.add_row(
            row.recipe,
            str(row.alignment),
            f"{plan.batch_size} {'yes' if row.is_legal else 'no'}",
            ", ".join(nearest_legal),
            reason,
        )
    return table


def _traffic_table(plan: Plan) -> Table:
    table = _table("Sent by a rank in a step, MiB", "what", "NVLink", "network")
    for strategy in plan.strategies:
        for what, sent in strategy.sent.items():
            row = f"{strategy.name}: {what}"
            table.add_row(row, f"{sent.nvlink / MIB:,.0f}", f"{sent.network / MIB:,.0f}")
    return table


def _loader_table(plan: Plan) -> Table:
    loader, asked, local = plan.loader, plan.asked_images_s, plan.nodes.local
    table = _table("Loader (prediction)", "pictures/s", "a rank", "a node")
    on_card, threads = VIEWS in loader.rates, f"{loader.num_threads} threads"
    if loader.filled_cores < loader.num_threads:
        threads += f" on {loader.filled_cores:.3g} cores"
    names = {
        READING: f"reading, {loader.picture_bytes / 1e3:,.0f} kB each",
        ENGINES: f"JPEG engines, {loader.hardware_share:.0%} of them",
        THREADS: f"{threads}, decoding {'the rest' if on_card else 'and views'}",
        VIEWS: VIEWS,
    }
    for part, name in names.items():
        if part in loader.rates:
            table.add_row(name, *(f"{n * loader.rates[part]:,.0f}" for n in (1, local)))
    table.add_row("the loader", *(f"{n * loader.images_s:,.0f}" for n in (1, local)))
    table.add_row("asked by training", *(f"{n * asked:,.0f}" for n in (1, local)))
    table.add_section()
    busy, read = asked * loader.thread_s, asked * loader.picture_bytes / 1e9
    table.add_row(
        "cores that it takes",
        *(f"{n * busy:,.1f} of {round(n * loader.cores, 1):,g}" for n in (1, local)),
    )
    table.add_row("read, GB/s", *(f"{n * read:,.2f}" for n in (1, local)))
    table.add_row("decoding a picture, ms of a core", f"{1e3 * loader.decode_s:.2f}", "")
    place = "us of the card" if on_card else "ms of a core"
    table.add_row(f"its views, {place}", f"{loader.views_s * (1e6 if on_card else 1e3):.2f}", "")
    return table


def _verdict(plan: Plan) -> list[str]:
    """Return what bounds the run, and which changes help where that is the loader."""
    loader, asked, chosen = plan.loader, plan.asked_images_s, plan.chosen
    of = "" if chosen.name == "alone" else f" ({chosen.name})"
    if chosen.name != plan.own:
        of = f" ({chosen.name}, since {plan.own} does not fit)"
    if loader.images_s >= asked:
        return [
            f"{chosen.speed.bottleneck} bounds the run{of}: the loader gives "
            f"{loader.images_s / asked:.1f} times what training asks for\n"
        ]
    lines = [
        f"{loader.bound} bounds the run{of}: the loader gives {loader.images_s / asked:.0%} of "
        "what training asks for"
    ]
    for one in loader.helps:
        share = one.images_s / asked
        enough = "enough" if share >= 1 else f"{share:.0%} of it"
        lines.append(f"- {one.change}: {one.images_s:,.0f} pictures/s a rank, {enough}")
    return [*lines, ""]


def _speed_table(plan: Plan) -> Table:
    names = [strategy.name for strategy in plan.strategies]
    table = _table("Speed (prediction)", "", *names)
    speeds = [strategy.speed for strategy in plan.strategies]
    for label, field in (
        ("matrix products, ms", "compute_s"),
        ("card memory, ms", "memory_s"),
        ("gradients and weights sent, ms", "gradients_s"),
        ("candidates sent, ms", "candidates_s"),
        ("loader, ms", "loader_s"),
        ("step with overlap, ms", "step_s"),
        ("step without overlap, ms", "step_without_overlap_s"),
    ):
        table.add_row(label, *(f"{1e3 * getattr(speed, field):,.1f}" for speed in speeds))
    table.add_section()
    for label, field in (
        ("images/s", "images_s"),
        ("images/s without overlap", "images_without_overlap_s"),
        ("images/s of the loader", "loader_images_s"),
    ):
        table.add_row(label, *(f"{getattr(speed, field):,.0f}" for speed in speeds))
    table.add_row("MFU", *(f"{speed.mfu:.1%}" for speed in speeds))
    table.add_row("bottleneck", *(speed.bottleneck for speed in speeds))
    return table
