"""Tables of the README and the docs, written from the ledger between two marks.

    <!-- ledger:NAME -->
    the table of TABLES[NAME], and where its rows come from
    <!-- /ledger -->

`m3i-fast bench page --readme` writes them anew; a test fails where they differ from the ledger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.ledger import launches_table
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger.demo_table import table as demo_table
from m3i_fast.benchmarks.ledger.rows import Row
from m3i_fast.op_registry import OPS

FILES = (
    *("README.md", "docs/measure/performance.md", "docs/measure/comparing.md"),
    "docs/measure/launches.md",
)
MARKED = re.compile(r"(<!-- ledger:(\w+) -->\n).*?(<!-- /ledger -->)", re.DOTALL)
OURS = "m3i_fast"
ABSENT = "not measured yet"
# What no implementation can beat: the least memory traffic, the bare products, no work at all.
FLOORS = ("copy", "no sampling", "four_gemms", "three_gemms", "two_gemms", "one_gemm")
PREDICTED = ("m3i_vit_b_h100", "m3i_vit_l_h100")


def fill(text: str) -> str:
    """Return the text with every marked table written anew. Raises ValueError for a wrong name."""

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"ledger:{match[2]}: expected one of {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[match[2]]().strip()}\n{match[3]}"

    return MARKED.sub(table, text)


def update(root: Path) -> list[Path]:
    """Write the marked tables of FILES anew; the files that changed."""
    changed = []
    for path in (root / name for name in FILES):
        before = path.read_text()
        if (after := fill(before)) != before:
            path.write_text(after)
            changed.append(path)
    return changed


# ---- Rows ----------------------------------------------------------------------------------------


def newest(subject: str, *, device: str = "cpu", **settings: Any) -> list[Row]:
    """Return the last row of each size, of the machine class that was measured last."""
    rows = [
        row
        for row in ledger.read_rows(subject)
        if row["figures"].get("device") == device
        and all(row["figures"].get(name) == value for name, value in settings.items())
    ]
    latest: dict[str, Row] = {}
    for row in rows:
        if row["machine_class"] == rows[-1]["machine_class"]:
            latest[json.dumps(ledger.settings_of(row), sort_keys=True)] = row
    return list(latest.values())


def source(rows: Sequence[Row], words: str) -> str:
    """Return the sentence below a table: what it shows, and which rows."""
    commits = ", ".join(dict.fromkeys(map(ledger.commit_of, rows)))
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(r["command"] for r in rows))
    days = ", ".join(dict.fromkeys(row["time"][:10] for row in rows))
    threads = {row["figures"].get("num_threads") for row in rows} - {None}
    machine = rows[-1]["machine_class"]
    if threads:
        machine += f", {min(threads)} thread{'s' if min(threads) > 1 else ''}"
    return f"{words} {machine}; {commands}; {days}, commit {commits}."


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, its first column aligned left and all others right."""
    ruled = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ruled, *lines))


def times(row: Row, name: str) -> str:
    """Return how many times as long as ours a function takes; - where it was not measured."""
    ratio = row["figures"]["times_slower_than_ours"].get(name)
    return "-" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def milliseconds(row: Row) -> str:
    """Return our milliseconds, and the fifths between which they varied."""
    timing = row["figures"]["timings"][OURS]
    median, low, high = (_three_digits(timing[f"{name}_ms"]) for name in ("median", "p20", "p80"))
    return f"{median} ({low} to {high})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def peers_table(
    rows: Sequence[Row],
    heading: str,
    label: Callable[[Mapping[str, Any]], str],
    columns: Mapping[str, str],
) -> str:
    """Return a table with a line a row: ours in ms, and the functions of `columns` by title."""
    if not rows:
        return ABSENT
    lines = [
        [label(row["figures"]), milliseconds(row), *(times(row, name) for name in columns)]
        for row in rows
    ]
    head = [heading, "ours, ms (fifths)", *columns.values()]
    words = "Medians; of the others, how many times as long as ours."
    return f"{markdown(head, lines)}\n\n{source(rows, words)}"


# ---- Tables --------------------------------------------------------------------------------------


def demo() -> str:
    """Return the demo's table over its seeds, as `m3i-fast bench demo` prints it."""
    table = demo_table().partition("\n\n")[2]
    return table or f"The demo: {ABSENT}."


def ops() -> str:
    """Return a line for every op: its benchmark, and when that last ran."""
    days = {op.name: [row["time"][:10] for row in ledger.read_rows(op.name)] for op in OPS}
    if not any(days.values()):
        return f"The ops: {ABSENT}."
    lines = [
        [f"`m3i-fast bench {op.name}`: {op.measures}", (days[op.name] or [ABSENT])[-1]]
        for op in OPS
    ]
    return markdown(["benchmark", "last rows"], lines)


def mask_mix() -> str:
    def label(row: Mapping[str, Any]) -> str:
        return f"{row['batch_size']} views of {row['image_size']} pixels, {row['dtype']}"

    columns = {
        "torch": "torch",
        "bytes first": "torch, bytes first",
        "compiled": "that compiled",
        "copy": "floor: copy",
    }
    return peers_table(newest("mask_mix"), "`mask_mix`", label, columns)


def gaussian() -> str:
    def label(row: Mapping[str, Any]) -> str:
        size = f"{row['batch_size']} x {row['queries']} x {row['width']}, {row['dtype']}"
        return size + (", decorrelated" if row["decorrelation_weight"] else "")

    rows = newest("gaussian", **{"pass": "forward+backward"})
    columns = {"torch": "torch", "compiled": "compiled", "copy": "floor: copy"}
    return peers_table(rows, "`gaussian`, forward + backward", label, columns)


def dcnv3() -> str:
    def label(row: Mapping[str, Any]) -> str:
        size = f"{row['height']} x {row['width']} x {row['channels']}"
        return f"{size}, {row['pass'].replace('+', ' + ')}"

    rows = newest("dcnv3", dtype="float32")
    columns = {"grid_sample": "grid_sample", "torchvision": "torchvision", "copy": "floor: copy"}
    return peers_table(rows, "layer of InternImage-T, batch 4, fp32", label, columns)


def boltzmann() -> str:
    of_labels = dict.fromkeys(("classes", "soft"), "cross_entropy")
    peers = {"softmax": "ClipLoss", "sigmoid": "SigLipLoss", **of_labels}

    def label(row: Mapping[str, Any]) -> str:
        return f"{row['form']}, {row['rows']:,} x {row['columns']:,} x {row['dim']}"

    rows = newest("boltzmann", kind="speed", **{"pass": "forward+backward"})
    if not rows:
        return ABSENT
    lines = []
    for row in rows:
        timings = row["figures"]["timings"]
        peer = next((n for n in timings if n.startswith(peers[row["figures"]["form"]])), "-")
        floor = next((name for name in FLOORS if name in timings), "-")
        cells = [label(row["figures"]), milliseconds(row)]
        cells += [f"{times(row, name)} ({name.replace('_', ' ')})" for name in (peer, floor)]
        lines.append(cells)
    head = ["`boltzmann`, N x M x D", "ours, ms (fifths)", "published loss", "floor: bare GEMMs"]
    words = "Medians, fp32, forward + backward; of the others, how many times as long as ours."
    return f"{markdown(head, lines)}\n\n{source(rows, words)}"


def internimage() -> str:
    rows = newest("internimage", train=False)

    def label(row: Mapping[str, Any]) -> str:
        share = f", {row['op_share']:.0%} in the op" if row["op_share"] is not None else ""
        return f"{row['size'].upper()}, {row['batch_size']} x {row['image_size']}^2{share}"

    columns = {"grid_sample": "grid_sample", "no sampling": "floor: no sampling"}
    return peers_table(rows, "InternImage, forward, fp32", label, columns)


def step() -> str:
    rows = newest("step")[-1:]  # earlier ones asked other cells
    if not rows:
        return ABSENT
    lines = [
        [
            f"{row['figures']['batch_size']} pictures",
            f"{row['figures']['images_per_s'][OURS]:.0f}",
            *(times(row, name) for name in ("eager", "eager, asked only")),
        ]
        for row in rows
    ]
    head = ["a step of M3I", "ours, pictures/s", "plain torch", "plain, asked views only"]
    words = "Medians, fp32; of the others, how many times as long as ours."
    return f"{markdown(head, lines)}\n\n{source(rows, words)}"


def gpu() -> str:
    """Return the table of kernels on cards, and of what a roofline predicts of training."""
    lines = [
        line
        for subject in (*(op.name for op in OPS), "internimage")
        for line in map(_on_a_card, newest(subject, device="cuda"))
        if line
    ]
    head = ["on a GPU", "ours, ms (fifths)", "fastest other", "floor"]
    measured = markdown(head, lines) if lines else f"On a GPU: {ABSENT}."
    return f"{measured}\n\n{_predictions()}"


def _on_a_card(row: Row) -> list[str]:
    ratios = row["figures"].get("times_slower_than_ours", {})
    floors = [name for name in ratios if name in FLOORS]
    others = sorted((ratios[name], name) for name in ratios if name not in (OURS, *floors))
    if OURS not in row["figures"].get("timings", {}):
        return []
    settings = ", ".join(
        f"{name} {value}"
        for name, value in ledger.settings_of(row).items()
        if name not in ("device", "num_threads", "kind")
    )
    return [
        f"{row['subject']}, {settings}, {row['machine']['gpu']}",
        milliseconds(row),
        f"{times(row, others[0][1])} ({others[0][1]})" if others else "-",
        f"{times(row, floors[0])} ({floors[0]})" if floors else "-",
    ]


@cache  # builds and traces whole models
def _predictions() -> str:
    from m3i_fast.costs.gpus import CARDS
    from m3i_fast.costs.traffic import Nodes
    from m3i_fast.planning.plan import make_plan
    from m3i_fast.recipes import recipes

    lines = []
    for name in PREDICTED:
        plan = make_plan(recipes()[name](), card=CARDS["h100"], nodes=Nodes(8, 8))
        speed = plan.strategies[0].speed
        cells = [f"`{name}`, 8 H100, {plan.global_batch:,} images a step", ABSENT]
        lines.append([*cells, f"{speed.images_s:,.0f}", f"{speed.mfu:.0%}", speed.bottleneck])
    head = ["training", "measured", "predicted, images/s", "predicted, MFU", "bound by"]
    return (
        f"{markdown(head, lines)}\n\nPredictions are a roofline's (`m3i-fast plan`), with its "
        "stated assumptions; no card has confirmed them."
    )


def loader() -> str:
    """Return the images a second of each way to load the same views, where it was measured."""
    # Rows that name no source are of a loader whose views DALI's own operators cut.
    rows = [row for row in newest("loader") if "source" in row["figures"]]
    if not rows:
        return f"Loaders: {ABSENT}."
    lines = []
    for row in rows:
        figures = row["figures"]
        for name, rate in sorted(
            figures["images_per_s"].items(), key=lambda item: -item[1]["median"]
        ):
            lines.append([f"{_views(figures)}: {name}", _rate(rate), times(row, name)])
    floors = dict.fromkeys(row["figures"]["floor"]["decoder"] for row in rows)
    words = (
        "Medians and their 95 % intervals; how many times as long as ours an image takes. "
        f"The floor, which only decodes, is {' or '.join(floors)}."
    )
    return f"{markdown(['loader', 'images/s', 'x ours'], lines)}\n\n{source(rows, words)}"


def _views(figures: Mapping[str, Any]) -> str:
    local = figures["local_views"]
    views = figures["global_views"] + ("" if local == "none" else f" + {local}")
    return views if figures["source"] == "page_cache" else f"{views}, {figures['source']}"


def node() -> str:
    """Return the newest row of `bench node` of each recipe."""
    rows = [row for row in ledger.read_rows("node") if "verdict" in row["figures"]]
    rows = list({row["figures"]["recipe"]: row for row in rows}.values())
    if not rows:
        return f"A node: {ABSENT} (`m3i-fast bench node RECIPE`)."
    lines = []
    for row in rows:
        figures = row["figures"]
        rates = [_rate(m["per_node"]) for m in figures["measurements"].values()]
        what = f"{figures['recipe']}, {figures['device']}, batch {figures['batch_size']}"
        lines.append([what, *rates[:3], figures["verdict"]["bottleneck"]])
    head = ["recipe", "loader alone", "training alone", "both", "bottleneck"]
    return f"{markdown(head, lines)}\n\n{source(rows, 'Images/s and their 95 % intervals.')}"


def scaling() -> str:
    """Return the newest row of `bench scaling` of each number of ranks, without predictions."""
    rows = [row for row in ledger.read_rows("scaling") if row["figures"]["kind"] == "measured"]
    newest_rows = {
        tuple(row["figures"][key] for key in ("recipe", "device", "mode", "ranks")): row
        for row in rows
    }
    if not rows:
        return f"Scaling: {ABSENT} (`m3i-fast bench scaling RECIPE`)."
    lines = []
    for (recipe, device, mode, ranks), row in newest_rows.items():
        figures = row["figures"]
        kept, sent = figures["efficiency"], figures["communication_share"]
        lines.append(
            [
                f"{recipe}, {device}, {mode}, {ranks} x {figures['batch_per_rank']}",
                _rate(figures["images_s"]),
                f"{kept['value']:.2f} ({kept['ci_low']:.2f} to {kept['ci_high']:.2f})",
                f"{sent['value']:.0%}" if sent else "-",
            ]
        )
    head = ["recipe, ranks x batch", "images/s", "efficiency", "communication"]
    words = "95 % intervals; ranks are gloo processes of one thread on a CPU."
    return f"{markdown(head, lines)}\n\n{source(list(newest_rows.values()), words)}"


def _rate(rate: Mapping[str, float]) -> str:
    return f"{rate['median']:,.0f} ({rate['ci_low']:,.0f} to {rate['ci_high']:,.0f})"


def rates_of(figures: Mapping[str, Any], name: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Return every rate that has an interval, by its path in the figures."""
    lines: list[tuple[str, Mapping[str, Any]]] = []
    for key, value in figures.items():
        if isinstance(value, Mapping):
            path = f"{name}, {key}" if name else key
            own = {"median", "ci_low", "ci_high"} <= value.keys()
            lines += [(path, value)] if own else rates_of(value, path)
    return lines


def gate() -> str:
    """Return how often `bench compare` errs, by the newest self-test of each op."""
    rows = list({row["figures"]["work"]: row for row in ledger.read_rows("gate")}.values())
    if not rows:
        return f"The gate: {ABSENT} (`m3i-fast bench compare mask_mix --self-test 20`)."
    lines = []
    for row in rows:
        f = row["figures"]
        plain, planted = f["unchanged"], f["planted"]
        alarms = plain["slower"] + plain["faster"]
        lines.append(
            [
                f["work"],
                f"{alarms} of {plain['comparisons']}",
                f"{min(plain['ratios']):.3f} to {max(plain['ratios']):.3f}",
                f"{planted['slower']} of {planted['comparisons']} (+{f['slowdown']:.0%})",
                f"{min(planted['ratios']):.3f} to {max(planted['ratios']):.3f}",
                f"{max(plain['seconds_a_comparison'], planted['seconds_a_comparison']):.1f}",
            ]
        )
    head = ["work", "alarms, unchanged", "ratios", "found, slower", "ratios", "s a comparison"]
    figures = rows[-1]["figures"]
    words = f"Alpha {figures['alpha']:g}, threshold {figures['threshold']:g}."
    return f"{markdown(head, lines)}\n\n{source(rows, words)}"


def launches() -> str:
    """Return what a step of each recipe asks of a GPU, counted on the null CUDA runtime."""
    return launches_table.recipes_table(markdown)


def launches_of_settings() -> str:
    return launches_table.settings_table(markdown)


def launches_by_module() -> str:
    return launches_table.modules_table(markdown)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(demo, mask_mix, gaussian, dcnv3, boltzmann, internimage, step),
        *(loader, node, scaling, gpu, gate, ops),
        *(launches, launches_of_settings, launches_by_module),
    )
}
