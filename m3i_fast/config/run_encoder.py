"""Which encoder of a run is meant: RUN, the one that was trained; RUN,which=ema, its average."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

Which = Literal["trained", "ema"]
PREFIXES: dict[str, str] = {"trained": "encoder.", "ema": "target_encoder.encoder."}
"""What the names of an encoder's weights begin with in a checkpoint."""


@dataclass(frozen=True, slots=True)
class NamedEncoder:
    """The image encoder of a run, as a flag or a config names it."""

    run: Path
    """Run directory."""
    which: Which = "trained"
    """The encoder that was trained, or its moving average."""

    @classmethod
    def of(cls, text: str) -> NamedEncoder:
        """Read DIR or DIR,which=ema. Raises ValueError for another option or value."""
        run, separator, which = text.rpartition(",which=")
        if not separator:
            return cls(Path(text))
        expect_which(which)
        return cls(Path(run), cast(Which, which))

    @property
    def prefix(self) -> str:
        """Return what the names of its weights begin with in a checkpoint."""
        return PREFIXES[self.which]


def expect_run(path: Path, flag: str = "", other: str = "") -> None:
    """Raise FileNotFoundError unless `path` is the folder of a run.

    flag: which named it. other: what may be typed in the place of a run.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{flag}: no run in {path}: expected a folder that m3i-fast train --out has written, "
            f"with config.json{other}".removeprefix(": ")
        )


def expect_which(which: str) -> None:
    """Raise ValueError unless this is one of PREFIXES."""
    if which not in PREFIXES:
        raise ValueError(f"which: expected trained or ema, got {which!r}")
