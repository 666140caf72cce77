"""The state of a loader: DALI's checkpoint, counters, and the fingerprint that has to match."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from typing import Any

STATE_VERSION = 1
STATE: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "epoch": (int,),
    "step": (int,),
    "dali_checkpoint": (str, type(None)),
    "fingerprint": (dict,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """Everything that decides which batches follow; threads and prefetching do not."""

    dali_version: str
    device: str
    dataset: str
    split: str
    batch_size: int
    shard_id: int
    num_shards: int
    seed: int
    graph: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """The position of a loader after the last batch it returned."""

    epoch: int
    step: int  # batches of this epoch that were returned
    checkpoint: bytes | None  # DALI's own; None before the first batch


def pack_state(position: Position, fingerprint: Fingerprint) -> dict[str, Any]:
    """Return a position and a fingerprint as a dict for JSON."""
    raw = position.checkpoint
    return {
        "version": STATE_VERSION,
        "epoch": position.epoch,
        "step": position.step,
        "dali_checkpoint": None if raw is None else base64.b64encode(raw).decode("ascii"),
        "fingerprint": asdict(fingerprint),
    }


def unpack_state(state: dict[str, Any], fingerprint: Fingerprint) -> Position:
    """Return the position of a state made by `pack_state`.

    Raises ValueError for another dict or version, and where fingerprints differ, listing for each
    entry what was expected (the state's) and got.
    """
    for key, kinds in STATE.items():
        value = state.get(key)
        if not isinstance(value, kinds) or (isinstance(value, int) and value < 0):
            raise ValueError(f"loader state: expected {key} of a loader, got {value!r}")
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"loader state: expected version {STATE_VERSION}, got {state.get('version')!r}"
        )
    saved, current = state["fingerprint"], asdict(fingerprint)
    differing = [
        f"{key}: expected {saved.get(key)!r}, got {current.get(key)!r}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise ValueError("loader state of another run: " + "; ".join(differing))
    raw = state["dali_checkpoint"]
    return Position(
        epoch=state["epoch"],
        step=state["step"],
        checkpoint=None if raw is None else base64.b64decode(raw, validate=True),
    )
