"""What `bench node` prints."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

ENERGY_UNKNOWN = "energy: not known on this machine"


def show(console: Console, figures: dict[str, Any]) -> None:
    """Print the rates, and the verdict on them."""
    console.print(_rates(figures))
    if figures["num_ranks"] > 1:
        console.print(_by_rank(figures["measurements"]))
    console.print(_beside_plan(figures))
    for line in _notes(figures):
        console.print(line, highlight=False, soft_wrap=True)
    said = figures["verdict"]
    console.print(
        Text.assemble(
            (f"\nbottleneck: {said['bottleneck']}", "bold"),
            f"; without it up to {said['headroom']:.2f} times the images",
        )
    )
    for sentence in said["evidence"]:
        console.print(f"- {sentence}", highlight=False, soft_wrap=True)


def _rates(figures: dict[str, Any]) -> Table:
    unit = "GPU" if figures["device"] == "cuda" else "process"
    title = (
        f"{figures['recipe']} on {figures['num_ranks']} x {figures['device']}, source images/s: "
        f"{figures['batch_size']} a batch, {figures['precision']}, threads: torch "
        f"{figures['num_threads']}, loader {figures['loader_threads']}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = (f"a {unit}", "95 % interval", "p5 - p95", "a node", "step, ms", "windows")
    for column in columns:
        table.add_column(column, justify="right")
    for name, each in figures["measurements"].items():
        rates, windows = each["per_gpu"], str(each["num_windows"])
        if each["num_throttled"]:
            windows += f", {each['num_throttled']} throttled, {each['num_left_out']} left out"
        table.add_row(
            name if each["is_settled"] else f"{name} (not settled)",
            f"{rates['median']:,.4g}",
            f"{rates['ci_low']:,.4g} - {rates['ci_high']:,.4g}",
            f"{rates['p5']:,.4g} - {rates['p95']:,.4g}",
            f"{each['per_node']['median']:,.4g}",
            f"{each['step_ms']:,.4g}",
            windows,
        )
    return table


def _beside_plan(figures: dict[str, Any]) -> Table | str:
    """Return the plan's images/s beside what was measured, and the loader's share of training."""
    plan, measured = figures["plan"], figures["measurements"]
    if "unknown" in plan:
        return f"plan: not known: {plan['unknown']}"
    table = Table(
        title=f"source images/s of a rank, planned ({plan['card']}) and measured",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "plan", "measured"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for part, rate in plan["loader_parts"].items():
        table.add_row(f"loader: {part}", f"{rate:,.4g}", "")
    for name, planned in (
        ("loader", plan["loader"]),
        ("training", plan["training"]),
        ("both", plan["both"]),
    ):
        rates = measured["synthetic" if name == "training" else name]["per_gpu"]
        table.add_row(name, f"{planned:,.4g}", f"{rates['median']:,.4g}")
    share = figures["loader_share"]
    table.add_row(
        "loader over training", f"{plan['loader'] / plan['training']:.2f}", f"{share:.2f}"
    )
    table.add_row("bound by", plan["bound"], figures["verdict"]["bottleneck"])
    return table


def _by_rank(measurements: dict[str, Any]) -> Table:
    table = Table(
        title="by rank, medians", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in ("rank", *measurements):
        table.add_column(column, justify="right")
    each = zip(*(measured["per_rank"] for measured in measurements.values()), strict=True)
    for rank, rates in enumerate(each):
        table.add_row(str(rank), *(f"{rate:,.4g}" for rate in rates))
    return table


def _notes(figures: dict[str, Any]) -> list[str]:
    """Of the pictures, the use of the card and its energy."""
    data, used = figures["data"], figures["efficiency"]
    notes = [
        f"pictures: {data['num_pictures']:,} of {data['name']}, {data['smallest_hw']} to "
        f"{data['largest_hw']} pixels, {data['shard_bytes_per_picture'] / 1024:,.0f} KiB each; the "
        "same come again and again, from memory where they fit"
    ]
    notes.append(f"threads of the first rank's loader: {figures['loader_cores']}")
    threads = figures["num_threads"] + figures["loader_threads"]
    of_node = figures["num_ranks"] // figures["num_nodes"] * threads
    if figures["device"] == "cpu" and of_node > figures["num_cores"]:
        notes.append(f"{of_node} threads share {figures['num_cores']} cores")
    if "unknown" in used:
        notes.append(f"MFU: not known: {used['unknown']}")
    else:
        notes.append(
            f"MFU {used['mfu']:.1%}, HFU {used['hfu']:.1%} of a peak that is {used['peak_of']} "
            f"({used['card']}); {used['model_flop_s'] / 1e9:,.4g} model GFLOP/s"
        )
    joules = figures["joules_per_image"]
    notes.append(ENERGY_UNKNOWN if joules is None else f"energy: {joules:.4g} J an image")
    return notes


def show_sweep(console: Console, figures: dict[str, Any]) -> None:
    """Print a line for each point, with the best marked."""
    points = figures["sweep"]
    table = Table(
        title=f"{figures['recipe']}: source images/s of {figures['num_ranks']} ranks",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for axis in points[0]["values"]:
        table.add_column(axis, justify="right", no_wrap=True)
    for column in ("loader", "synthetic", "both", "bottleneck"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for point in points:
        table.add_row(*map(str, point["values"].values()), *_of_point(point))
    console.print(table)


def _of_point(point: dict[str, Any]) -> list[str | Text]:
    if point["status"] != "measured":
        return ["", "", "", "", f"{point['status']}: {point['reason']}"]
    measured = point["figures"]["measurements"]
    rates = (measured[name]["per_node"]["median"] for name in ("loader", "synthetic", "both"))
    note = [Text("best", "green")] * point["is_best"]
    if point["reason"]:
        note.append(Text(point["reason"]))
    return [
        *(f"{rate:,.4g}" for rate in rates),
        point["figures"]["verdict"]["bottleneck"],
        Text(", ").join(note),
    ]
