"""A profile's summary as Markdown, and the sentences and tables that the page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_ROWS = 30

Summary = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings, and rows of cells."""


def title(summary: Summary) -> str:
    """Return the title of the profile."""
    return f"Profile of {summary['recipe']} on {summary['device']}"


def activity_title(summary: Summary) -> str:
    """Return what the activities are: kernels on a GPU, operators without one."""
    return "Kernels" if summary["kind"] == "cuda" else "Operators"


def sentences(summary: Summary) -> list[str]:
    """Return sentences on what was measured and on what stands out."""
    pace = summary["pace"]
    lines = [
        f"{summary['num_steps']} steps of {summary['step_ms']:.1f} ms, recorded by "
        f"{summary['profiler']}. Without it {pace['before_ms']:.1f} ms before and "
        f"{pace['after_ms']:.1f} ms after: profiling took {pace['slowdown']:.2f} times as long.",
        f"Waiting for data: {_percent(summary['data_wait_share'])} of the step.",
    ]
    gpu = summary["gpu"]
    if gpu is None and summary["kernels"]:
        lines.append(
            "No GPU: operators of the CPU are shown, and what runs outside all operators is "
            f"{_percent(1 - summary['work_share'])} of the step."
        )
    elif gpu is None:
        lines.append(
            "No GPU: calls of the operating system are shown; operators are, by --profiler torch. "
            f"The thread of the steps is in such calls {_percent(os_share(summary))} of the step."
        )
    else:
        lines.append(
            f"The GPU idles {_percent(gpu['idle_share'])} of the step, at most "
            f"{gpu['longest_idle_ms']:.2f} ms at once; {gpu['num_streams']} streams."
        )
        if gpu["comm_overlap"] is not None:
            lines.append(
                f"Communication takes {gpu['comm_ms']:.2f} ms a step, of which "
                f"{_percent(gpu['comm_overlap'])} runs beside other work."
            )
    return lines


def stage_table(summary: Summary) -> Table:
    """Return the table of stages, with GPU times where there is a GPU."""
    last, key = (
        ("GPU, ms", "device_ms") if summary["kind"] == "cuda" else ("Own timer, ms", "own_ms")
    )
    return ["Stage", "Host, ms", "Share", last], [
        [stage["name"], _ms(stage["ms"]), _percent(stage["share"]), _ms(stage[key])]
        for stage in summary["stages"]
    ]


def family_table(summary: Summary) -> Table:
    """Return the table of kernel families."""
    return ["Family", "ms a step", "Share"], [
        [row["title"], _ms(row["ms"]), _percent(row["share"])] for row in summary["families"]
    ]


def kernel_table(summary: Summary) -> Table:
    """Return the table of the longest kernels; rates have their share of a known card's peak."""
    head = ["Name", "Family", "ms a step", "Share", "Calls", "GFLOP/s", "Argument GB/s"]
    rows = [
        [
            row["name"],
            row["family"],
            _ms(row["ms"]),
            _percent(row["share"]),
            f"{row['calls']:.4g}",
            _rate(row["flop_s"], row["of_peak_flop_s"]),
            _rate(row["byte_s"], row["of_peak_byte_s"]),
        ]
        for row in summary["kernels"][:MAX_ROWS]
    ]
    return head, rows


def wait_heading(summary: Summary) -> str:
    """Return the heading of the table of host waits."""
    if summary["kind"] == "cuda":
        return "Lines at which the host waits for the GPU"
    return "Lines at which the host reads a tensor: it would wait for a GPU that the tensor lay on"


def wait_table(summary: Summary) -> Table:
    """Return the table of host waits in one further step, each with the line that causes it."""
    return ["Operator", "Stage", "Calls a step", "Line"], [
        [wait["name"], wait["stage"], f"{wait['calls']:g}", " < ".join(wait["stack"]) or "-"]
        for wait in summary["waits"]
    ]


def recorded_heading(summary: Summary) -> str:
    """Return the heading of the table of waits that the profiler itself recorded."""
    if summary["kind"] == "cpu" and summary["profiler"] == "nsys":
        return "Calls of the operating system by the thread of the steps"
    return "The same, as the profiler recorded them"


def device_wait_table(summary: Summary) -> Table:
    """Return the table of the host's waits that the profiler itself recorded."""
    return ["Call", "Stage", "Calls a step", "ms a step"], [
        [wait["name"], wait["stage"], f"{wait['calls']:.3g}", _ms(wait["ms"])]
        for wait in summary["device_waits"][:MAX_ROWS]
    ]


def os_share(summary: Summary) -> float:
    """Return the share of the step that its thread spends in calls of the operating system."""
    total: float = sum(call["ms"] for call in summary["device_waits"]) / summary["step_ms"]
    return total


def thread_table(summary: Summary) -> Table:
    """Return the table of the process's other threads in calls of the operating system."""
    return ["Threads", "Number", "Calls a step", "ms a step", "Most of it in"], [
        [use["name"], str(use["num"]), f"{use['calls']:.4g}", _ms(use["ms"]), use["longest"]]
        for use in summary["threads"]
    ]


def loader_table(summary: Summary) -> Table:
    """Return the table of the loader's longest operators."""
    return ["Operator", "Calls a step", "ms a step"], [
        [row["name"], f"{row['calls']:.4g}", _ms(row["ms"])] for row in summary["loader"][:MAX_ROWS]
    ]


def tables(summary: Summary) -> list[tuple[str, Table]]:
    """Return all tables with their headings, without those that this profiler cannot fill."""
    found = [("Stages", stage_table(summary))]
    if summary["kernels"]:
        found += [
            ("Families", family_table(summary)),
            (activity_title(summary), kernel_table(summary)),
        ]
    found += [
        (wait_heading(summary), wait_table(summary)),
        (recorded_heading(summary), device_wait_table(summary)),
    ]
    if summary["loader"]:
        found.append(("Operators of the loader, on threads of its own", loader_table(summary)))
    if summary["threads"]:
        found.append(("Other threads in calls of the operating system", thread_table(summary)))
    return found


def markdown(summary: Summary) -> str:
    """Return the text of summary.md."""
    paragraphs = [f"# {title(summary)}", *sentences(summary)]
    paragraphs += [f"> {note}" for note in summary["notes"]]
    for heading, (head, rows) in tables(summary):
        paragraphs.append(f"## {heading}")
        paragraphs.append(table(head, rows) if rows else "None.")
    return "\n\n".join(paragraphs) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _rate(per_s: float | None, of_peak: float | None) -> str:
    if per_s is None:
        return "-"
    return f"{per_s / 1e9:.4g}" + (f" ({_percent(of_peak)})" if of_peak is not None else "")
