"""m3i-fast bench roofline: what each kernel should take on a card, what binds it, and how sure.

    m3i-fast bench roofline [--card h100] [--op dcnv3]     our kernels
    m3i-fast bench roofline --show published               the model beside published times
    m3i-fast bench roofline --show constants               each constant and its source
    m3i-fast bench roofline --measured FOLDER              beside the rows of a card

Predictions: no GPU has run any of it. The slowest of six columns binds a phase (model.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.table import Table

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.terminal import make_console

SHORT = {"wavefronts": "wavefr.", "exponentials": "exp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Predict the time of kernels from bytes, sectors, wavefronts and issue slots."""

    show: Literal["kernels", "published", "constants"] = "kernels"
    """Our kernels; published times, the worst prediction first; constants with their sources."""
    card: Literal["a100", "h100", "h200", "gh200"] = "h100"
    """The card that our kernels are predicted on."""
    op: str = "all"
    """Whose kernels: an op's name, as dcnv3, or all."""
    phases: bool = False
    """A line for each phase of a call."""
    measured: Path | None = None
    """Folder with rows of the op benchmarks, <op>.jsonl: write predicted beside measured there."""

    def __post_init__(self) -> None:
        from m3i_fast.benchmarks.roofline.calls import OPS

        if self.op not in ("all", *OPS):
            raise ValueError(f"op: expected all or one of {', '.join(OPS)}; got {self.op!r}")
        if self.measured is not None and not self.measured.is_dir():
            raise ValueError(f"measured: expected a folder with <op>.jsonl, got {self.measured}")


def _table(title: str, *columns: str) -> Table:
    shown = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        is_text = column in ("call", "bound by", "constant", "source")
        least = 20 if column in ("call", "constant", "source") else None
        justify: Literal["left", "right"] = "left" if is_text else "right"
        shown.add_column(column, justify=justify, no_wrap=not is_text, min_width=least)
    return shown


def _cells(columns: dict[str, float]) -> list[str]:
    return [f"{ms:.2g}" if ms else "" for ms in columns.values()]


def kernels_table(cfg: Config) -> Table:
    """Return the predictions of our kernels: milliseconds by column, and what binds."""
    from m3i_fast.benchmarks.roofline.calls import shown_calls
    from m3i_fast.costs.kernels.constants import rates_of
    from m3i_fast.costs.kernels.model import COLUMNS

    rates = rates_of(cfg.card)
    names = [SHORT.get(column, column) for column in COLUMNS]
    shown = _table(f"predicted on {cfg.card}, ms", "call", *names, "in all", "bound by")
    op = None
    for call in shown_calls():
        if cfg.op not in ("all", call.op):
            continue
        if call.op != op:
            shown.add_section()
            shown.add_row(call.op)
            op = call.op
        made = call.predict(rates)
        shown.add_row(f"  {call.name}", *_cells(made.columns), f"{made.ms:.3g}", made.binds)
        for phase in made.phases if cfg.phases else ():
            shown.add_row(
                f"    {phase.name}", *_cells(phase.columns), f"{phase.ms:.3g}", phase.binds
            )
    return shown


def published_table() -> Table:
    """Return the model beside published times, the worst first."""
    from m3i_fast.benchmarks.roofline.published import all_published, sensitivity

    columns = ("call", "ms", "predicted", "ratio", "otherwise", "bound by")
    title = "published times of others; otherwise: the ratio with other published constants"
    shown = _table(title, *columns)
    for case in all_published():
        made, ratios = case.predicted(), sensitivity(case).values()
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        shown.add_row(
            f"{case.card}: {case.name}",
            *(f"{case.ms:.3g}", f"{made.ms:.3g}", f"{case.ratio:.2f}", spread, made.binds),
        )
    return shown


def constants_table() -> Table:
    """Return every constant with its values and its source."""
    from m3i_fast.costs.kernels.constants import CONSTANTS, NAMES

    shown = _table("constants", "constant", *NAMES, "source")
    for name, constant in CONSTANTS.items():
        values = [f"{constant.values[card]:.4g}" for card in NAMES]
        others = f" Not taken: {constant.others}." if constant.others else ""
        unit = f"{name}, {constant.unit}" if constant.unit else name
        shown.add_row(unit, *values, f"{constant.source}.{others}")
    return shown


def main(argv: list[str] | None = None) -> int:
    """Print the tables; returns 0."""
    cfg = read_command(Config, "roofline", argv)
    console = make_console()
    if cfg.measured is not None:
        from m3i_fast.benchmarks.roofline.measured import PAGE, markdown, write_compared

        console.print(markdown(*write_compared(cfg.measured)), highlight=False, soft_wrap=True)
        console.print(f"written: {cfg.measured / PAGE}", highlight=False, soft_wrap=True)
        return 0
    if cfg.show == "kernels":
        console.print(kernels_table(cfg))
    else:
        console.print(published_table() if cfg.show == "published" else constants_table())
    console.print("Predictions: no GPU has run any of it.", highlight=False)
    return 0
