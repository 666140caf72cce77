"""Rendezvous of a run's ranks before their first collective; reports the ranks that are missing."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from m3i_fast.engine.parallel.watchdog import MissingRanks, describe_ranks

logger = logging.getLogger(__name__)
_POLL, _LOOK_EVERY = 0.1, 10.0  # s
_COUNT, _VERDICT = "count", "verdict"
_LONGEST = 1e8  # s: a timedelta takes no infinity


def join_store(seconds: float) -> dist.Store:
    """Return the store that the environment names, once every rank has set its key in it.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are those of torchrun, whose agent hosts the
    store; without torchrun rank 0 hosts it. Raises MissingRanks after `seconds`, naming the missing
    ranks, and ValueError where one of the variables is not set.
    """
    rank, size = int(_variable("RANK")), int(_variable("WORLD_SIZE"))
    began, looked, absent = time.monotonic(), 0.0, [0]
    try:
        store = _connect(rank, size, min(seconds, _LONGEST))
        store.set(_key(rank), "")
        store.add(_COUNT, 1)
        # Polled, since a store's wait that times out prints warnings about sockets.
        while store.add(_COUNT, 0) < size:
            if store.check([_VERDICT]):
                raise MissingRanks(store.get(_VERDICT).decode())
            waited = time.monotonic() - began
            if waited >= looked + _LOOK_EVERY or waited >= seconds:
                looked, absent = waited, missing_ranks(store, range(size))
                if absent and waited >= seconds:
                    raise _verdict(store, _message(absent, size, seconds))
                if absent and rank == min(set(range(size)).difference(absent)):
                    logger.warning(
                        "waiting for %s since %.0f s", describe_ranks(absent, size), waited
                    )
            time.sleep(_POLL)
    except dist.DistNetworkError as error:  # the store's host is not reachable
        if rank == 0 and not _has_agent():
            raise
        host = "torchrun of the first node" if _has_agent() else "rank 0"
        text = _message(absent, size, time.monotonic() - began)
        raise MissingRanks(f"{text}; {host} is not reached: {error}") from None
    store.set_timeout(default_pg_timeout)
    return store


def missing_ranks(store: dist.Store, ranks: Sequence[int]) -> list[int]:
    """Return those of `ranks` whose key is not in the store, by bisection."""
    if store.check([_key(rank) for rank in ranks]):
        return []
    if len(ranks) == 1:
        return list(ranks)
    half = len(ranks) // 2
    return missing_ranks(store, ranks[:half]) + missing_ranks(store, ranks[half:])


def _verdict(store: dist.Store, text: str) -> MissingRanks:
    """Publish the reason in the store, give other ranks time to read it, and return the error."""
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
    # An agent that restarts its ranks may keep the store, so each start has keys of its own.
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _variable(name: str) -> str:
    if not os.environ.get(name):
        raise ValueError(
            f"{name}: expected this environment variable, as torchrun sets it, beside WORLD_SIZE = "
            f"{os.environ.get('WORLD_SIZE')}, got none: start with m3i-fast launch, or unset "
            "WORLD_SIZE for one process"
        )
    return os.environ[name]


def _has_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _key(rank: int) -> str:
    return f"joined/{rank}"


def _message(absent: Sequence[int], size: int, waited: float) -> str:
    return (
        f"missing after {waited / 60:.2g} minutes: {describe_ranks(absent, size)}; look at their "
        "output and whether their nodes are up, or wait longer with --init-minutes"
    )
