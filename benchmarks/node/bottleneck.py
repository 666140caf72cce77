"""What bounds a node, from rates of its parts: pure, with the numbers that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from m3i_fast.benchmarks.core.rate_statistics import Rates

Bottleneck = Literal["loader", "model", "communication", "throttled clock", "balanced"]

TIE = 0.05  # two rates that differ by less are not told apart, nor are those whose intervals meet
EXCHANGE_SHARE = 0.25  # of a step: to hide it gives a third more images
THROTTLED_SHARE = 0.5  # of the windows


@dataclass(frozen=True, kw_only=True, slots=True)
class Throttling:
    """How far the device was throttled in the windows in which it computed."""

    num_windows: int = 0
    num_throttled: int = 0
    reasons: Sequence[str] = ()
    mean_mhz: float | None = None
    """SM clock while throttled; None: not known."""
    max_mhz: float | None = None
    """The highest that was seen."""

    @property
    def share(self) -> float:
        return self.num_throttled / self.num_windows if self.num_windows else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Source images a second of one GPU (or CPU process), and what was seen beside."""

    loader: Rates
    """The loader alone."""
    synthetic: Rates
    """Training on batches that are in memory."""
    both: Rates
    """Training on what the loader gives."""
    data_wait: float
    """Share of the step of `both` that waits for data."""
    num_ranks: int = 1
    without_exchange: Rates | None = None
    """As `synthetic`, the ranks not exchanging gradients; None: one rank, or not to be had."""
    throttling: Throttling = Throttling()

    @property
    def exchange_share(self) -> float | None:
        """Return the share of a synthetic step that the exchange of gradients adds, unhidden."""
        if self.without_exchange is None:
            return None
        return max(0.0, 1 - self.synthetic.median / self.without_exchange.median)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    bottleneck: Bottleneck
    evidence: tuple[str, ...]
    headroom: float
    """Images a second with the bottleneck gone, up to what bounds next, over those of now."""


def verdict(findings: Findings) -> Verdict:
    """Return the first of these verdicts that holds.

    balanced: loader and training alone are as fast as one another. loader: it is the slower. Of
    slower training: communication where what the exchange adds is EXCHANGE_SHARE of the step and
    told from nothing, throttled clock where THROTTLED_SHARE of the windows were, else model.
    """
    bottleneck = _bottleneck(findings)
    return Verdict(
        bottleneck=bottleneck,
        evidence=tuple(_evidence(findings)),
        headroom=max(1.0, _without(bottleneck, findings) / findings.both.median),
    )


def _bottleneck(findings: Findings) -> Bottleneck:
    if _tied(findings.loader, findings.synthetic):
        return "balanced"
    if findings.loader.median < findings.synthetic.median:
        return "loader"
    silent, share = findings.without_exchange, findings.exchange_share or 0.0
    if silent is not None and share >= EXCHANGE_SHARE and not _tied(findings.synthetic, silent):
        return "communication"
    if findings.throttling.share >= THROTTLED_SHARE:
        return "throttled clock"
    return "model"


def _without(bottleneck: Bottleneck, findings: Findings) -> float:
    """Images/s that the rest allows."""
    loader, synthetic = findings.loader.median, findings.synthetic.median
    match bottleneck:
        case "loader":
            return synthetic
        case "model":
            return loader
        case "balanced":
            return max(loader, synthetic)
        case "communication":
            assert findings.without_exchange is not None
            return min(loader, findings.without_exchange.median)
        case "throttled clock":
            return min(loader, synthetic * _clock_ratio(findings.throttling))


def _clock_ratio(throttling: Throttling) -> float:
    """How much faster the full clock is; 1 where it is not known."""
    if not throttling.mean_mhz or not throttling.max_mhz:
        return 1.0
    return throttling.max_mhz / throttling.mean_mhz


def _tied(a: Rates, b: Rates) -> bool:
    if abs(a.median - b.median) <= TIE * max(a.median, b.median):
        return True
    return a.ci_low <= b.ci_high and b.ci_low <= a.ci_high


def _evidence(findings: Findings) -> list[str]:
    said = [
        f"images/s of one GPU or process: loader alone {_shown(findings.loader)}, training on "
        f"batches in memory {_shown(findings.synthetic)}, both together {_shown(findings.both)}",
        f"{findings.data_wait:.0%} of a step waits for data",
        _of_exchange(findings),
        _of_clocks(findings.throttling),
    ]
    slower = min(findings.loader.median, findings.synthetic.median)
    if findings.both.ci_high < slower and findings.both.median < (1 - TIE) * slower:
        said.append(
            f"together they are {1 - findings.both.median / slower:.0%} slower than the slower of "
            "the two alone: they take something from each other, cores or memory"
        )
    return said


def _shown(rates: Rates) -> str:
    return f"{rates.median:,.4g} ({rates.ci_low:,.4g} to {rates.ci_high:,.4g})"


def _of_exchange(findings: Findings) -> str:
    share = findings.exchange_share
    if findings.num_ranks == 1:
        return "one rank: nothing is exchanged"
    if share is None:
        return (
            "what the exchange adds to a step is not told: with spread weights a step cannot do "
            "without it (--parallel.shard 1 can)"
        )
    return (
        f"exchanging gradients adds {share:.0%} of a step: {_shown(findings.synthetic)} images/s "
        f"with it, {_shown(findings.without_exchange)} without"  # type: ignore[arg-type]
    )


def _of_clocks(throttling: Throttling) -> str:
    if not throttling.num_windows:
        return "clocks were not read"
    said = f"{throttling.num_throttled} of {throttling.num_windows} windows throttled"
    if throttling.reasons:
        said += f" ({', '.join(throttling.reasons)})"
    if throttling.num_throttled and throttling.mean_mhz and throttling.max_mhz:
        said += f": {throttling.mean_mhz:,.0f} MHz in them, {throttling.max_mhz:,.0f} at most"
    return said
