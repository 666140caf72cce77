"""m3i-fast methods: the known methods as a table of terms, or one with its formulas."""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from rich import box
from rich.table import Table

from m3i_fast.cli import refuse
from m3i_fast.config.objective.losses import LOSSES
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.did_you_mean import nearest
from m3i_fast.objectives.methods import METHODS, Method
from m3i_fast.terminal import make_console

INPUTS = {
    "own_image": "2 images, each alone",
    "joint": "2 images together",
    "masked": "masked view",
    "none": "view",
}
STANDARDISED = {
    "running": "by running mean and variance",
    "batch": "by mean and variance of the step's rows",
    "phi_s": "by one scale, in a basis in which they have one variance, in place of LN",
}
MEANS = {
    "batch": "all rows, 0 for one without a target",
    "members": "the rows that have a target",
}
ENCODERS = {
    "none": "",
    "momentum": ", EMA",
    "shared": ", same encoder",
    "frozen": ", frozen",
    "snapshot": ", earlier EMA",
}
console = make_console()


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Every known method as a list of terms; `m3i-fast train demo_NAME` trains one."""

    explain: str | None = None
    """One method with the formula of each term."""


def main(argv: list[str]) -> int:
    command = tyro.cli(Methods, prog="m3i-fast methods", args=argv)
    if command.explain is None:
        console.print(table())
        return 0
    name = command.explain.lower().replace(" ", "_").replace("-", "_")
    if name not in METHODS:
        return refuse(
            f"--explain: expected one of {', '.join(METHODS)}, got {command.explain!r}."
            + nearest(name, METHODS)
        )
    console.print("\n".join(explain(name)), highlight=False)
    return 0


def table() -> Table:
    """Return a table of the methods, a line a term."""
    listing = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "paper", "input", "predicts"):
        listing.add_column(column, no_wrap=column in ("name", "paper"))
    for name, method in METHODS.items():
        facts = name, method.paper.removeprefix("arXiv "), shown(method)
        for number, term in enumerate(method.terms):
            listing.add_row(*(facts if number == 0 else ("", "", "")), predicted(term))
    return listing


def predicted(term: Term) -> str:
    """Say what a term predicts: `features, other view, EMA: decoder, gaussian, decorrelation`."""
    parts = [] if term.predictor == "none" else [_predictor(term)]
    parts += [] if term.likelihood == "none" else [term.likelihood.replace("_", " ")]
    parts.append(term.regulariser.replace("_", " "))
    return f"{target(term)}: {', '.join(parts)}"


def _predictor(term: Term) -> str:
    """Say which networks predict: `projector + predictor`."""
    return {"mask_token": "mask token + projector"}.get(
        term.predictor, term.predictor.replace("_", " + ")
    )


def shown(method: Method) -> str:
    """Say what the encoder sees: `masked view, 75%`."""
    text = INPUTS[method.mode]
    if method.mode == "masked":
        text += f", {method.mask_ratio:.0%}"
        text += " as mask tokens" if method.hidden == "mask_token" else ""
    return text + (", small views" if method.local_views else "")


def target(term: Term) -> str:
    """Say what a term's target is: `features, other view, EMA`."""
    if term.encoder == "none" and not term.is_dense:
        return term.target.replace("_", " ")
    view = f"{term.view} view"
    if term.symmetric:
        view = "each other view" if term.view == "other" else "each view"
    asked = "" if term.asked == "all" else f", {term.asked} image"
    return f"{term.target.replace('_', ' ')}, {view}{ENCODERS[term.encoder]}{asked}"


def explain(name: str) -> list[str]:
    """Return the lines that tell a method, then each term with its formula."""
    method = METHODS[name]
    lines = [f"{method.title} ({method.paper}), {method.family}", f"input: {shown(method)}"]
    if method.differs:
        lines.append(f"differs from the paper: {method.differs}")
    lines += ["", "L = " + " + ".join(f"{t.weight:g} L_{t.name}" for t in method.terms)]
    for term in method.terms:
        formula = LOSSES[term.loss_key].formula
        lines += [
            "",
            f"L_{term.name} = {formula}",
            f"  z: {target(term)}; {term.kind.help}",
        ]
        if term.predictor != "none":
            lines.append(f"  z_hat: {_predictor(term)} of the input's tokens")
        if term.standardise != "none":
            lines.append(f"  channels of z standardised: {STANDARDISED[term.standardise]}")
        if term.target == "caption_tokens" and method.parallel_captions:
            lines.append(f"  predicted from the picture alone: {method.parallel_captions:.0%}")
        if term.column:
            lines.append(f"  column of the data: {term.column}")
        if term.regulariser == "sigreg":
            sizes = ObjectiveConfig()
            weight = f"w = {sizes.sigreg_weight:g}, " if term.likelihood != "none" else ""
            lines.append(f"  {weight}{sizes.num_slices} directions a, drawn anew at each step")
        if term.reversal:
            rise = f", rising over {term.reversal_steps} steps" if term.reversal_steps else ""
            lines.append(f"  gradient of the encoder reversed: times -{term.reversal:g}{rise}")
        if term.is_annotation:
            lines.append(f"  mean over {MEANS[term.mean]}")
        if term.likelihood == "boltzmann" and not term.is_annotation:
            lines.append(f"  tau = {term.temperature:g}")
    return lines
