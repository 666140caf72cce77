"""The meeting of a run's ranks before their first collective, and who is missing from it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from m3i_fast.engine.parallel.watchdog import MissingRanks

logger = logging.getLogger(__name__)
_POLL, _LOOK_EVERY = 0.1, 10.0  # s
_COUNT, _VERDICT = "count", "verdict"
_LONGEST = 1e8  # s: a timedelta takes no infinity


def meet(seconds: float) -> dist.Store:
    """Return the store that the environment names, after every rank has left its key in it.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are those of torchrun, whose agent hosts the
    store; without torchrun rank 0 does. Raises MissingRanks, which names them, after `seconds`, and
    ValueError where one of the variables is missing.
    """
    rank, size = int(_variable("RANK")), int(_variable("WORLD_SIZE"))
    began, looked, absent = time.monotonic(), 0.0, [0]
    try:
        store = _connect(rank, size, min(seconds, _LONGEST))
        store.set(_key(rank), "")
        store.add(_COUNT, 1)
        # Asked again and again: a wait that runs out of time prints warnings of sockets.
        while store.add(_COUNT, 0) < size:
            if store.check([_VERDICT]):
                raise MissingRanks(store.get(_VERDICT).decode())
            waited = time.monotonic() - began
            if waited >= looked + _LOOK_EVERY or waited >= seconds:
                looked, absent = waited, missing(store, range(size))
                if absent and waited >= seconds:
                    raise _verdict(store, _text(absent, size, seconds))
                if absent and rank == min(set(range(size)).difference(absent)):
                    logger.warning("waiting for %s since %.0f s", _told(absent, size), waited)
            time.sleep(_POLL)
    except dist.DistNetworkError as error:  # the store's host is not there, or no longer
        if rank == 0 and not _has_agent():
            raise
        host = "torchrun of the first node" if _has_agent() else "rank 0"
        text = _text(absent, size, time.monotonic() - began)
        raise MissingRanks(f"{text}; {host} is not reached: {error}") from None
    store.set_timeout(default_pg_timeout)
    return store


def missing(store: dist.Store, ranks: Sequence[int]) -> list[int]:
    """Those of `ranks` whose key is not in the store; a few questions where most are there."""
    if store.check([_key(rank) for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    half = len(ranks) // 2
    return missing(store, ranks[:half]) + missing(store, ranks[half:])


def _verdict(store: dist.Store, text: str) -> MissingRanks:
    """Tell the other ranks, before this one and maybe the store end; return what ends it."""
    store.set(_VERDICT, text)
    time.sleep(10 * _POLL)
    return MissingRanks(text)


def _connect(rank: int, size: int, seconds: float) -> dist.Store:
    store = dist.TCPStore(
        _variable("MASTER_ADDR"),
        int(_variable("MASTER_PORT")),
        size,
        is_master=rank == 0 and not _has_agent(),
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    # An agent that starts its ranks again may keep the store.
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _variable(name: str) -> str:
    if not os.environ.get(name):
        raise ValueError(
            f"{name}: expected in the environment, as torchrun sets it, beside WORLD_SIZE = "
            f"{os.environ.get('WORLD_SIZE')}, got none: start with m3i-fast launch, or unset "
            "WORLD_SIZE for one process"
        )
    return os.environ[name]


def _has_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _key(rank: int) -> str:
    return f"joined/{rank}"


def _told(absent: Sequence[int], size: int) -> str:
    names = ", ".join(map(str, absent[:20])) + (", ..." if len(absent) > 20 else "")
    what = "rank" if len(absent) == 1 else f"{len(absent)} ranks:"
    return f"{what} {names} (of 0 to {size - 1})"


def _text(absent: Sequence[int], size: int, waited: float) -> str:
    return (
        f"missing after {waited / 60:.2g} minutes: {_told(absent, size)}; see what they printed, "
        "and whether their nodes are up, or have train wait longer with --init-minutes"
    )
