"""How the nodes' agents (torchrun's processes, which start a node's ranks) part from each other."""

from __future__ import annotations

import logging
import time

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)

logger = logging.getLogger(__name__)

PATIENT = "m3i_fast_c10d"
"""Name of the backend, for `--rdzv-backend`."""
SECONDS_TO_END = 60.0


class PatientRendezvous(RendezvousHandler):
    """c10d's rendezvous, with time for the ranks to end after the node that hosts the store has.

    An agent asks the store ten times a second whether more nodes want to join. One agent hosts the
    store and ends with its own ranks: without patience, those of other nodes that end a moment
    later are killed, and that they saved is lost in an error of the connection.
    """

    def __init__(self, store: RendezvousHandler, *, seconds: float = SECONDS_TO_END) -> None:
        self._c10d, self._seconds = store, seconds
        self._lost_at: float | None = None

    def num_nodes_waiting(self) -> int:
        """Return how many nodes want to join: none once the store is gone.

        Raises RendezvousConnectionError where it has been gone for `seconds`.
        """
        if self._lost_at is None:
            try:
                return self._c10d.num_nodes_waiting()
            except RendezvousConnectionError:
                self._lost_at = time.monotonic()
                logger.info("the first node has ended: %g s for these ranks", self._seconds)
        elif time.monotonic() - self._lost_at > self._seconds:
            return self._c10d.num_nodes_waiting()  # raises, and tells how the connection failed
        return 0

    def shutdown(self) -> bool:
        """Close the rendezvous; return whether there was still a store to close it in."""
        return self._lost_at is None and self._c10d.shutdown()

    def get_backend(self) -> str:
        """Return c10d's name."""
        return self._c10d.get_backend()

    @property
    def use_agent_store(self) -> bool:
        """Whether the ranks meet in the first agent's store."""
        return self._c10d.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes, as c10d does."""
        return self._c10d.next_rendezvous()

    def is_closed(self) -> bool:
        """Return whether a node has closed the rendezvous."""
        return self._c10d.is_closed()

    def set_closed(self) -> None:
        """Close the rendezvous for all nodes."""
        self._c10d.set_closed()

    def get_run_id(self) -> str:
        """Return the value of `--rdzv-id`."""
        return self._c10d.get_run_id()


def register() -> None:
    """Let `--rdzv-backend` name it."""
    rendezvous_handler_registry.register(PATIENT, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    parameters.backend = "c10d"  # the registry holds the handler's own name against it
    return PatientRendezvous(rendezvous_handler_registry.create_handler(parameters))
