"""The table of scaling's rows: what was measured, and below it, marked, what is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

MEASURED, PREDICTED = "measured", "predicted"
MARK = "*"
COLUMNS = ("batch", "images/s", "E(n), 95 %", "serial", "comm.", "reduce", "MFU", "spread")


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table, a section a mode; spread: how much slower the slowest rank alone is."""
    first = rows[0]
    ranks = "gloo processes of one thread" if first["device"] == "cpu" else first["card"]
    title = f"Scaling of {first['recipe']} over {ranks}"
    caption = _caption(rows)
    shown = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("ranks", no_wrap=True)
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for mode in dict.fromkeys(row["mode"] for row in rows):
        shown.add_row(mode)
        for row in rows:
            if row["mode"] == mode and row["kind"] == MEASURED:
                shown.add_row(f"  {row['ranks']}{_dagger(row)}", *_measured(row))
            elif row["mode"] == mode:
                for point in row["points"]:
                    shown.add_row(f"  {point['ranks']:,}{MARK}", *_predicted(point))
        shown.add_section()
    return shown


def _dagger(row: Mapping[str, Any]) -> str:
    return "+" if row["shares_cores"] else ""


def _measured(row: Mapping[str, Any]) -> list[str]:
    rate, scaled, serial = (
        row["images_s"]["median"],
        row["efficiency"],
        row["karp_flatt"]["serial_fraction"],
    )
    return [
        str(row["batch_per_rank"]),
        f"{rate:,.4g}",
        f"{scaled['value']:.3f} {scaled['ci_low']:.2f}-{scaled['ci_high']:.2f}",
        "-" if serial is None else f"{serial:.3f}",
        _share(row["communication_share"]),
        _share(row["reduction_share"]),
        f"{row['model_flops']['mfu']:.1%}",
        f"{row['ranks_alone']['spread']:.1%}",
    ]


def _predicted(point: Mapping[str, float]) -> list[str]:
    return [
        f"{point['batch_per_rank']:g}",
        f"{point['images_s']:,.4g}",
        f"{point['efficiency']:.3f} {'-':>9}",
        "-",
        f"{point['exposed_ms'] / point['step_ms']:.1%}",
        *["-"] * 3,
    ]


def _share(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['value']:.1%}"


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    measured = [row for row in rows if row["kind"] == MEASURED]
    sentences = [f"MFU of the peak: {measured[0]['model_flops']['peak_of']}."] if measured else []
    if any(row["shares_cores"] for row in measured):
        sentences.append(
            "+: more processes than cores, so that E(n) says how they share cores and nothing "
            "about a network; the model is not fitted to them."
        )
    sentences += [prediction(row) for row in rows if row["kind"] == PREDICTED]
    return " ".join(sentences)


def prediction(row: Mapping[str, Any]) -> str:
    """Return a sentence on what a prediction rests on, and how far to trust it."""
    errors = row["leave_one_out_error"]
    said = ", ".join(f"{error:+.1%} at {ranks}" for ranks, error in errors.items())
    checked = f"a step at ranks left out: {said}" if said else "no step of several ranks to check"
    if not row["points"]:
        return f"{row['mode']}: nothing predicted, too small a batch for so many; {checked}."
    where = f"{row['card']}, nodes of {row['gpus_per_node']}"
    return f"{MARK} {row['mode']}: PREDICTED, not measured ({where}); {checked}."
