"""What benchmarks of ops that pass over their arguments share: flags, peers held equal, figures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from m3i_fast.benchmarks.core.harness import Device, measure, resolve

OURS, COPY = "m3i_fast", "copy"

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PassConfig:
    device: Device = "auto"
    """auto: the GPU where torch sees one."""
    num_samples: int = 50
    """Samples of each function, interleaved."""
    compile: bool = True
    """Also time the expression through torch.compile; where that fails, the reason is logged."""
    record: bool = True
    """Append the rows to the ledger, the op's file in benchmarks/results."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {self.num_samples}")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function through torch.compile, for the sizes of its first call."""
    torch._dynamo.reset()  # or another size would make it compile for any size, slower
    return torch.compile(function, fullgraph=True, dynamic=False)


def expect_equal(
    candidates: Mapping[str, Callable[[], T]], check: Callable[[str, T], object]
) -> dict[str, Callable[[], object]]:
    """Call each candidate once, pass its name and value to `check`, and return them all.

    One that the compiler fails on is left out, with a warning.
    """
    functions: dict[str, Callable[[], object]] = {}
    for name, run in candidates.items():
        try:
            value = run()
        except torch._dynamo.exc.BackendCompilerFailed as error:  # no C++ compiler, say
            logger.warning("%s left out: %s", name, str(error).splitlines()[0])
            continue
        check(name, value)
        functions[name] = run
    return functions


def copy_of(num_bytes: int, device: str) -> Callable[[], object]:
    """Return a copy that moves so many bytes, half of them read and half written."""
    source, target = (
        torch.ones(num_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2)
    )
    return lambda: target.copy_(source)


def timed(
    cfg: PassConfig, functions: dict[str, Callable[[], object]], num_bytes: int
) -> dict[str, Any]:
    """Time functions in turns; return a row's figures of them. num_bytes: of an ideal pass."""
    device = resolve(cfg.device)
    timings = measure(functions, device=device, num_samples=cfg.num_samples)
    milliseconds = timings[OURS].median_ms
    return {
        "device": device,
        "num_threads": torch.get_num_threads(),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "times_slower_than_ours": {name: t.median_ms / milliseconds for name, t in timings.items()},
        "gb_s": num_bytes / (milliseconds * 1e6),
        "copy_gb_s": num_bytes / (timings[COPY].median_ms * 1e6),
    }
