"""Whole training steps of two versions in turns: time, images/s, losses, share of the GEMM rate.

Both versions take the steps of their own recipe of one name from its seed, on one batch that the
present version has drawn. They have to do the same: a recipe whose values differ, another dtype or
losses further apart than rounding are refused before anything is timed. `step_work.py` says what a
version has to have.

The share is that of the matrix product's rate in `core/product_rate.py`, timed in turns with the
steps. Its numerator is the step's model FLOP, forward and backward, as the present version counts
them for both (`costs/step_flops.py`): what a version computes beyond them makes its share smaller.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.table import Table

from m3i_fast.benchmarks.compare.gate import Samples, Verdict
from m3i_fast.benchmarks.compare.versions import Groups, Plan, Said, Steps, Version, sample_in_turns
from m3i_fast.benchmarks.core.harness import Timing, summarise
from m3i_fast.benchmarks.core.product_rate import SQUARE, rate_gflop_s, square_products
from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import TrainConfig
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.recipes import recipes

OURS = "m3i_fast"
NOT_ON_A_CPU = {"cuda_graphs"}
"""Paths of values that no step here depends on: their spelling may differ."""
Judge = Callable[[Callable[[], Sequence[Sequence[Samples]]]], Verdict]
"""`judge_in_looks` with its settings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """Losses of the first steps of the baseline and of the candidate."""

    baseline: list[float]
    candidate: list[float]

    @property
    def differences(self) -> list[float]:
        """Return what each step's losses differ by, relative to the baseline's."""
        pairs = zip(self.baseline, self.candidate, strict=True)
        return [abs(b - a) / max(abs(a), math.ulp(0.0)) for a, b in pairs]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepComparison:
    """What was measured of one recipe's step in both versions, the baseline first."""

    recipe: str
    versions: tuple[Version, Version]
    batch_size: int
    num_threads: int
    dtype: str
    timings: tuple[Timing, Timing]
    verdict: Verdict
    curves: Curves
    settings_of_one: list[str]
    """Paths of the recipe's values that one version alone has."""
    gflop: float | None
    """Model FLOP of a step, in 1e9; None where a teacher's size is unknown."""
    rate_gflop_s: float

    @property
    def images_per_s(self) -> list[float]:
        return [1e3 * self.batch_size / timing.median_ms for timing in self.timings]

    @property
    def shares(self) -> list[float | None]:
        """Return the share of the product's rate of each version."""
        if self.gflop is None:
            return [None, None]
        return [1e3 * self.gflop / t.median_ms / self.rate_gflop_s for t in self.timings]

    @property
    def figures(self) -> dict[str, Any]:
        """Return the figures of a row of the ledger, of the baseline by its commit."""
        names = self.versions[0].commit[:12], OURS

        def of_both(values: Sequence[Any]) -> dict[str, Any]:
            return dict(zip(names[::-1], list(values)[::-1], strict=True))

        return {
            "device": "cpu",
            "num_threads": self.num_threads,
            "dtype": self.dtype,
            "recipe": self.recipe,
            "batch_size": self.batch_size,
            "against": names[0],
            "timings": of_both([asdict(timing) for timing in self.timings]),
            "minimum_ms": of_both([min(timing.samples_ms) for timing in self.timings]),
            "images_per_s": of_both(self.images_per_s),
            "verdict": asdict(self.verdict),
            "losses": of_both([self.curves.baseline, self.curves.candidate]),
            "loss_differences": self.curves.differences,
            "gemm": {
                "gflop": self.gflop,
                "rate_gflop_s": self.rate_gflop_s,
                "share": of_both(self.shares),
            },
        }


def config_of(recipe: str, *, batch_size: int, num_steps: int) -> TrainConfig:
    """Return the present version's recipe as both take it: on the CPU, eager.

    num_steps: those that a process takes. Raises ValueError where the recipe has fewer, or does not
    divide the batch.
    """
    train = recipes()[recipe]()
    if num_steps > train.num_steps:
        raise ValueError(
            f"curve, samples: expected at most the {train.num_steps} steps of {recipe} together, "
            f"got {num_steps}"
        )
    data = replace(train.data, batch_size=batch_size)
    return replace(train, data=data, device="cpu", compile=False)


def compare_steps(
    recipe: str,
    train: TrainConfig,
    plan: Plan,
    versions: tuple[Version, Version],
    *,
    curve: int,
    loss_bound: float,
    judge: Judge,
) -> StepComparison:
    """Take steps of the baseline and of the candidate in turns, and judge their times.

    train: as `config_of` gives it. plan: of the processes, its `steps` are set here. curve: the
    first steps, whose losses may differ by loss_bound, relative to the baseline's. Raises
    ValueError where the versions do not do the same or one lacks what a step needs.
    """
    with TemporaryDirectory(prefix="m3i-fast-compare-") as folder:
        batch, file = draw_batch(train), Path(folder) / "batch.pt"
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        if not batch.columns:
            del values["columns"]  # which a version of before there were any does not know
        torch.save(values, file)
        run = _Run(
            recipe, replace(plan, work=recipe, steps=Steps(file, curve)), versions, loss_bound
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(plan.threads)  # of the product, as of a step
        try:
            verdict = judge(run.take)
        finally:
            torch.set_num_threads(threads)
    baseline, candidate = (
        summarise([ms for group in groups for ms in group]) for groups in run.groups
    )
    before, after = (_leaves(json.loads(said["config"])) for said in run.said)
    return StepComparison(
        recipe=recipe,
        versions=versions,
        batch_size=train.data.batch_size,
        num_threads=plan.threads,
        dtype=run.said[0]["dtype"],
        timings=(baseline, candidate),
        verdict=verdict,
        curves=Curves(baseline=run.said[0]["losses"], candidate=run.said[1]["losses"]),
        settings_of_one=sorted(before.keys() ^ after.keys()),
        gflop=_model_gflop(train),
        rate_gflop_s=rate_gflop_s(
            {name: statistics.median(taken) for name, taken in run.product_ms.items()}
        ),
    )


class _Run:
    """The looks at one recipe: samples of both versions, and of the product between them."""

    def __init__(
        self, recipe: str, plan: Plan, versions: tuple[Version, Version], loss_bound: float
    ) -> None:
        self._recipe, self._plan, self._versions = recipe, plan, versions
        self._loss_bound = loss_bound
        self._products: dict[str, Callable[[], torch.Tensor]] = {}
        self.groups: tuple[Groups, Groups] = ([], [])
        self.said: list[Said] = []
        self.product_ms: dict[str, list[float]] = {}

    def take(self) -> list[Groups]:
        """Return the groups of one more look."""
        new = sample_in_turns(self._plan, self._versions, check=self._check, between=self._between)
        for groups, of_version in zip(self.groups, new, strict=True):
            groups.extend(of_version)
        return new

    def _check(self, said: list[Said]) -> None:
        expect_same_work(
            self._recipe, [v.name for v in self._versions], said, loss_bound=self._loss_bound
        )
        if not self.said:
            dtype = getattr(torch, said[0]["dtype"])
            self._products = square_products(torch.device("cpu"), dtype)
            self.product_ms = {name: [] for name in self._products}
            for product in self._products.values():
                product()  # its first call is slower
        self.said = said

    def _between(self) -> None:
        for name, product in self._products.items():
            begun = time.perf_counter()
            product()
            self.product_ms[name].append((time.perf_counter() - begun) * 1e3)


def expect_same_work(
    recipe: str, names: Sequence[str], said: Sequence[Said], *, loss_bound: float
) -> None:
    """Raise ValueError unless two versions' first steps are of one recipe, dtype and curve.

    said: by `step_work.prepare`, of the baseline and of the candidate. Values that one version's
    recipe alone has are no difference: their default does what the other version did.
    """
    old, new = (_leaves(json.loads(each["config"])) for each in said)
    differing = [
        f"{path}: {old[path]!r} != {new[path]!r}"
        for path in (old.keys() & new.keys()) - NOT_ON_A_CPU
        if old[path] != new[path]
    ]
    if differing:
        raise ValueError(
            f"{recipe}: expected the same values in {names[0]} and {names[1]}, got "
            f"{'; '.join(sorted(differing))}"
        )
    if said[0]["dtype"] != said[1]["dtype"]:
        raise ValueError(
            f"{recipe}: expected one dtype, got {said[0]['dtype']} of {names[0]} and "
            f"{said[1]['dtype']} of {names[1]}"
        )
    curves = Curves(baseline=said[0]["losses"], candidate=said[1]["losses"])
    for step, difference in enumerate(curves.differences):
        if not difference <= loss_bound:  # also where a loss is no number
            before, after = curves.baseline[step], curves.candidate[step]
            raise ValueError(
                f"{recipe}: expected losses that differ by at most --loss-bound {loss_bound:g}, "
                f"got {difference:.2g} at step {step + 1}: {before!r} of {names[0]}, {after!r} of "
                f"{names[1]}; their times are not of the same work"
            )


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the values of a JSON object by their paths."""
    if not isinstance(tree, dict | list) or not tree:
        return {path: tree}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    below = [_leaves(value, f"{path}.{key}" if path else str(key)) for key, value in items]
    return {name: value for leaves in below for name, value in leaves.items()}


def _model_gflop(train: TrainConfig) -> float | None:
    try:
        return without_sampling(step_flops(train)).model / 1e9
    except (ValueError, FileNotFoundError):  # a frozen teacher
        return None


# ---- Words ---------------------------------------------------------------------------------------


def table(compared: StepComparison) -> Table:
    """Return a table with a line for each version."""
    shown = Table(
        title=f"{compared.recipe}, batch {compared.batch_size}, threads {compared.num_threads}, "
        f"{compared.dtype}",
        caption=_caption(compared),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("")
    for column in ("median ms", "minimum ms", "images/s", "share of GEMM rate"):
        shown.add_column(column, justify="right")
    rows = zip(
        compared.versions, compared.timings, compared.images_per_s, compared.shares, strict=True
    )
    for version, timing, rate, share in rows:
        shown.add_row(
            version.name,
            f"{timing.median_ms:.4g}",
            f"{min(timing.samples_ms):.4g}",
            f"{rate:.4g}",
            "unknown" if share is None else f"{share:.1%}",
        )
    return shown


def _caption(compared: StepComparison) -> str:
    before, after = compared.images_per_s
    count = len(compared.curves.baseline)
    said = [
        f"{compared.versions[1].name} has {after / before:.3f} times the images/s.",
        f"Losses of the first {count} steps differ by {max(compared.curves.differences):.2g} at "
        "most, relatively.",
    ]
    if compared.gflop is not None:
        said.append(
            f"A step has {compared.gflop:.4g} GFLOP, forward and backward; a GEMM of side {SQUARE} "
            f"reaches {compared.rate_gflop_s:.4g} GFLOP/s."
        )
    if compared.settings_of_one:
        said.append(f"One version alone has {', '.join(compared.settings_of_one)}.")
    return " ".join(said)
