"""Nodes whose ranks end at different times, on a store of c10d that one of them hosts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousParameters,
    rendezvous_handler_registry,
)

from m3i_fast.engine.parallel import agents


def c10d(port: int) -> RendezvousParameters:
    """Return what a node that does not host the store is given."""
    return RendezvousParameters(
        backend=agents.PATIENT,
        endpoint=f"127.0.0.1:{port}",
        run_id="run",
        min_nodes=1,
        max_nodes=1,
        is_host="false",
    )


def eventually(is_so: Callable[[], object]) -> bool:
    """Wait until it is so; the state that c10d holds on to is a second old."""
    deadline = time.monotonic() + 60
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(is_so())


def test_a_node_outlives_the_store_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    agents.register()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    handler = rendezvous_handler_registry.create_handler(c10d(store.port))
    assert isinstance(handler, agents.PatientRendezvous) and handler.get_backend() == "c10d"
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size, handler.num_nodes_waiting()) == (0, 1, 0)
    assert handler.use_agent_store and handler.get_run_id() == "run" and not handler.is_closed()
    del store  # its host has ended
    asked: list[int] = []
    assert eventually(
        lambda: asked.append(handler.num_nodes_waiting()) or "node has ended: 60 s" in caplog.text
    )
    assert handler.num_nodes_waiting() == 0 and not any(asked)
    assert not handler.shutdown()


def test_a_node_does_not_outlive_the_store_for_ever() -> None:
    agents.register()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = rendezvous_handler_registry.create_handler(c10d(store.port))
    handler = agents.PatientRendezvous(own._c10d, seconds=0)  # type: ignore[attr-defined]
    handler.next_rendezvous()
    del store
    with pytest.raises(RendezvousConnectionError):
        eventually(handler.num_nodes_waiting)


def test_a_node_closes_the_rendezvous_for_the_others() -> None:
    agents.register()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, second = (rendezvous_handler_registry.create_handler(c10d(store.port)) for _ in range(2))
    assert not second.is_closed() and first.shutdown() and eventually(second.is_closed)
