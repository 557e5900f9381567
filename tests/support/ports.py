"""Chooses ports for the servers that tests start."""

from __future__ import annotations

import socket

_given: set[int] = set()


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens, and a different one at each call.

    The kernel chooses it at random and forgets it as soon as the probing socket is closed: of
    nine servers that start together, two would have the same port once in 350 times, and the
    slower one would seem to answer through the faster.
    """
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port
