"""The tiles of kernels: candidates are compiled, pruned by a model, and timed where a card is.

    m3i-fast bench tune [--card a100|h100|cpu] [--op dcnv3|boltzmann] [--no-record]
    m3i-fast bench tune --write     and the winners become what is built

For a GPU NVRTC compiles every candidate to machine code, which needs no GPU: registers, spills,
shared memory, and from them how many blocks a multiprocessor runs. tile_roofline.py predicts a
time. Dropped, with the reason in the row: what cannot be built, spills or does not fit, what is
another candidate's code, and what the model holds to be 1.25 times as slow as its best. What is
left is built as operators and timed on a card of the class; without one its time is null. On the
CPU all candidates are built and timed.

A candidate counts where its results are those of plain torch, and wins where even its slow samples
(p80) are faster than the current policy's fast ones (p20).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from rich import box
from rich.progress import Progress
from rich.table import Table as RichTable

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.core.harness import Timing, publish
from m3i_fast.benchmarks.ledger.rows import read_rows, run_id
from m3i_fast.benchmarks.tune import build, timing
from m3i_fast.benchmarks.tune.candidates import (
    SUBJECTS,
    Subject,
    candidates,
    compile_candidate,
    predict,
    with_policy,
)
from m3i_fast.benchmarks.tune.compile import code_digest
from m3i_fast.ops import tiles
from m3i_fast.ops.tiles import CUDA, Policy, Table

SUBJECT = "tune"
MARGIN = 1.25  # beyond which the model's word is taken

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    op: Literal["all", "dcnv3", "boltzmann"] = "all"
    """Whose tiles."""
    card: Literal["auto", "a100", "h100", "cpu"] = "auto"
    """auto: the GPU's class where torch sees one, else cpu. Without that card compile half only."""
    kind: str = ""
    """One class of calls: small, large, half, float or blocks. All of them unless given."""
    most: int = 0
    """Candidates of a class at most, the current policy among them; 0: all."""
    num_samples: int = 20
    """Samples of each candidate, interleaved."""
    timing: bool = True
    """Time what is left; with --no-timing compile half only."""
    write: bool = False
    """Write the winners that were measured to cuda/<op>/tiles.json; the next build takes them."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/tune.jsonl."""

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ValueError(f"most: expected 0 or more, got {self.most}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {self.num_samples}")
        if self.write and not (self.record and self.timing):
            raise ValueError("write: expected with --record and --timing, whose row it names")

    def subjects(self, card: str) -> list[Subject]:
        """Return what is tuned on the card. Raises ValueError for a kind that the op lacks."""
        of_op = [each for each in SUBJECTS if each.card == card and self.op in ("all", each.op)]
        subjects = [each for each in of_op if self.kind in ("", each.kind)]
        if not subjects:
            kinds = ", ".join(dict.fromkeys(each.kind for each in of_op))
            raise ValueError(f"kind: expected one of {kinds} on {card}, got {self.kind!r}")
        return subjects


def card_here() -> str | None:
    """Return the class of the GPU that torch sees, else None."""
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    return {(8, 0): "a100", (9, 0): "h100"}.get(capability)


# ---- Candidates ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Candidate:
    """A policy and what is known of it so far."""

    policy: Policy
    current: bool
    resources: dict[str, Any] = field(default_factory=dict)
    predicted_ms: float | None = None
    code: tuple[Any, ...] = ()
    timing: Timing | None = None
    dropped: str | None = None
    chosen: bool = False

    @property
    def name(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.policy.items())


def compile_half(subject: Subject, table: Table, candidate: Candidate) -> None:
    """Compile a candidate, and note its resources and prediction, or why it is dropped."""
    if problem := tiles.problem_of(candidate.policy):
        candidate.dropped = f"cannot be built: {problem}"
        return
    filled = with_policy(table, subject, candidate.policy)
    compiled = compile_candidate(subject, filled)
    prediction = predict(subject, filled, compiled)
    used = compiled.kernels.values()
    candidate.resources = {
        "registers": max(kernel.registers for kernel in used),
        "spill_bytes": sum(kernel.spill_bytes for kernel in used),
        "shared_bytes": prediction.shared_bytes + max(kernel.shared_bytes for kernel in used),
        "blocks_per_multiprocessor": prediction.blocks,
        "kernels": {name: asdict(kernel) for name, kernel in compiled.kernels.items()},
    }
    candidate.predicted_ms = prediction.ms
    on_host = candidate.policy if subject.kind == "blocks" else None  # no kernel knows of it
    candidate.code = code_digest(compiled.cubin), compiled.constants, repr(on_host)
    if not prediction.blocks:
        candidate.dropped = "occupancy 0: no block fits a multiprocessor"


def prune(candidates: list[Candidate]) -> None:
    """Drop what spills, is another's code, or is slow by the model; the current one stays.

    The current one's spills are allowed: with nearly all registers in use NVRTC spills a little
    where nvcc, which has the budget, does not.
    """
    allowed = sum(each.resources.get("spill_bytes", 0) for each in candidates if each.current)
    for candidate in candidates:
        spilled = candidate.resources.get("spill_bytes", 0)
        if candidate.dropped is None and spilled > allowed:
            candidate.dropped = f"spills {spilled} bytes"
    left = [candidate for candidate in candidates if candidate.dropped is None]
    best = min((candidate.predicted_ms or 0 for candidate in left), default=0)
    first_of_code: dict[tuple[Any, ...], Candidate] = {}
    for candidate in left:
        twin = first_of_code.setdefault(candidate.code, candidate)
        ratio = (candidate.predicted_ms or 0) / best if best else 1
        if candidate.current:
            continue
        if twin is not candidate:
            candidate.dropped = f"the same code as {twin.name}"
        elif ratio > MARGIN:
            candidate.dropped = f"dominated: {ratio:.2f} times the model's best"


def time_half(
    subject: Subject, table: Table, candidates: list[Candidate], num_samples: int, bar: Progress
) -> None:
    """Time the candidates that are left, the current policy among them; return the winner."""
    device = "cpu" if subject.card == "cpu" else "cuda"
    left = [candidate for candidate in candidates if candidate.dropped is None]
    built = {}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:  # each compiles sources
        made = pool.map(
            lambda candidate: timing.build_candidate(subject, table, candidate.policy), left
        )
        libraries = list(bar.track(made, len(left), description=f"build {subject}"))
    for candidate, library in zip(left, libraries, strict=True):
        ops = build.load_ops(library)
        if problem := timing.check(subject, ops, device):
            candidate.dropped = f"wrong: {problem}"
            logger.warning("%s %s: %s", subject, candidate.name, candidate.dropped)
        else:
            built[candidate.name] = ops
    (current,) = (candidate for candidate in candidates if candidate.current)
    if current.name not in built:
        raise RuntimeError(f"{subject}: the current policy is dropped: {current.dropped}")
    timings = timing.time_candidates(subject, built, device, num_samples)
    winner = timing.fastest(timings, current.name)
    for candidate in left:
        candidate.timing = timings.get(candidate.name)
        candidate.chosen = candidate.name == winner


def sweep(cfg: Config, subject: Subject, *, timed: bool, bar: Progress) -> list[Candidate]:
    """Try all candidates of a class of calls."""
    table = tiles.read(subject.op)
    current = table[subject.card][subject.kind]
    policies = candidates(subject, current)[: cfg.most or None]
    tried = [Candidate(policy, policy == current) for policy in policies]
    if subject.card != "cpu":
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(partial(compile_half, subject, table), tried)
            list(bar.track(compiled, len(tried), description=f"compile {subject}"))
        prune(tried)
    if timed:
        time_half(subject, table, tried, cfg.num_samples, bar)
    return tried


# ---- Rows ----------------------------------------------------------------------------------------


def row_of(subject: Subject, candidate: Candidate) -> dict[str, Any]:
    timing = candidate.timing
    return {
        "card": subject.card,
        "op": subject.op,
        "kind": subject.kind,
        "dtype": subject.dtype,
        "shape": "x".join(map(str, subject.shape)),
        "candidate": candidate.name,
        "policy": candidate.policy,
        "current": candidate.current,
        **dict.fromkeys(
            ("registers", "spill_bytes", "shared_bytes", "blocks_per_multiprocessor", "kernels")
        ),
        **candidate.resources,
        "predicted_ms": candidate.predicted_ms,
        "measured_ms": timing.median_ms if timing else None,
        "timings": {candidate.name: asdict(timing)} if timing else {},
        "num_threads": torch.get_num_threads(),
        "dropped": candidate.dropped,
        "chosen": candidate.chosen,
    }


def table(rows: list[dict[str, Any]]) -> RichTable:
    shown = RichTable(title="tiles", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("policy", min_width=24)
    for column in ("regs", "spill", "KiB", "blocks", "model ms", "ms"):
        shown.add_column(column, justify="right", no_wrap=True)
    group = None
    for row in rows:
        heading = f"{row['op']} {row['card']}.{row['kind']}, {row['shape']}, {row['dtype']}"
        if heading != group:
            shown.add_section()
            shown.add_row(heading)
            group = heading
        shared = row["shared_bytes"]
        cells = (
            *(row["registers"], row["spill_bytes"], None if shared is None else shared // 1024),
            *(row["blocks_per_multiprocessor"], row["predicted_ms"], row["measured_ms"]),
        )
        texts = ("" if cell is None else f"{cell:.3g}" for cell in cells)
        marks = ["current"] * row["current"] + ["chosen"] * row["chosen"]
        said = row["dropped"] or ", ".join(marks)
        shown.add_row(f"  {row['candidate']}" + (f" ({said})" if said else ""), *texts)
    return shown


def all_rows(cfg: Config, card: str, *, timed: bool) -> Iterator[dict[str, Any]]:
    for subject in cfg.subjects(card):
        with Progress(transient=True) as bar:
            candidates = sweep(cfg, subject, timed=timed, bar=bar)
        yield from (row_of(subject, candidate) for candidate in candidates)


def write_winners() -> list[str]:
    """Write the policies that this run's rows chose to tiles.json, and the headers anew."""
    written = []
    for row in read_rows(SUBJECT):
        figures = row["figures"]
        if row["run_id"] != run_id() or not figures["chosen"]:
            continue
        op, kind = figures["op"], figures["kind"]
        source = {"run_id": row["run_id"], "time": row["time"]}
        entry = {"policy": figures["policy"], "why": "measured", "row": source}
        shared = (op, kind) == ("boltzmann", "float")  # one kernel serves both cards
        for card in ("a100", "h100") if shared else (figures["card"],):
            tiles.write_entry(tiles.path_of(op), card, kind, entry)
            written.append(f"{op} {card}.{kind}")
    tiles.write_headers()
    return written


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    if not (CUDA / "bindings.cpp").is_file():
        raise ValueError(f"tune: expected a checkout with the kernels' sources, got none in {CUDA}")
    here = card_here()
    if here is None and torch.cuda.is_available() and cfg.card == "auto":
        name = torch.cuda.get_device_name()
        raise ValueError(f"card: expected an A100's or H100's class for {name}; name one, or cpu")
    card = (here or "cpu") if cfg.card == "auto" else cfg.card
    timed = cfg.timing and card in ("cpu", here)
    if cfg.timing and not timed:
        logger.warning("no GPU of the class %s: compile half only, nothing is measured", card)
    publish(SUBJECT, all_rows(cfg, card, timed=timed), table, record=cfg.record)
    if cfg.write and timed:
        logger.warning("written: %s; `make install` builds them", ", ".join(write_winners()))
