"""A port that stays free until a server of this test or campaign opens it."""

from __future__ import annotations

import socket


def hold_port() -> socket.socket:
    """Return a socket that holds a free port of all addresses: `hold_port().getsockname()[1]`.

    While the socket is open, the kernel gives the port to no one who takes any port. A server with
    SO_REUSEADDR can still open it by its number, since the socket does not listen. Servers of
    Python, torch, Slurm and Prometheus set SO_REUSEADDR. A client is refused until one listens.
    """
    is_dual = socket.has_dualstack_ipv6()
    held = socket.socket(socket.AF_INET6 if is_dual else socket.AF_INET)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_dual:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    held.bind(("", 0))
    return held
