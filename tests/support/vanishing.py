"""Gives a server an address in a network namespace, from which it can vanish without a farewell."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000


class VanishingHost:
    """A host on the far side of a virtual cable; a socket that listens there stands for it."""

    def __init__(self) -> None:
        self.name = f"pgb{os.getpid()}"
        # A network of four addresses for each process: two runs of the tests must not share one.
        block, start = divmod(os.getpid() % 15_000, 60)
        self._ours, self.address = (f"10.213.{block}.{4 * start + n}" for n in (1, 2))
        self._cable = f"{self.name}a"[:15]
        self._far_end = f"{self.name}b"[:15]

    def make(self) -> None:
        near, far, name = self._cable, self._far_end, self.name
        _ip("netns", "add", name)
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("addr", "add", f"{self._ours}/30", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-n", name, "addr", "add", f"{self.address}/30", "dev", far)
        _ip("-n", name, "link", "set", far, "up")
        # The neighbour stays known: silence, and no "No route to host".
        found = subprocess.run(
            ["ip", "netns", "exec", name, "cat", f"/sys/class/net/{far}/address"],
            capture_output=True,
            text=True,
            check=True,
        )
        _ip("neigh", "replace", self.address, "lladdr", found.stdout.strip(), "dev", near)

    def listen(self) -> socket.socket:
        """Return a socket that listens at the host's address; it may be used in any thread."""

        def make() -> socket.socket:
            libc = ctypes.CDLL(None, use_errno=True)
            with Path("/var/run/netns", self.name).open() as there:
                if libc.setns(there.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            return socket.create_server((self.address, 0))

        with ThreadPoolExecutor(1) as in_the_namespace:  # its thread ends there
            return in_the_namespace.submit(make).result()

    def vanish(self) -> None:
        """Drop every packet that is sent to the host, and say nothing."""
        _ip("-n", self.name, "addr", "del", f"{self.address}/30", "dev", self._far_end)

    def remove(self) -> None:
        for command in (["link", "del", self._cable], ["netns", "del", self.name]):
            with suppress(subprocess.CalledProcessError):
                _ip(*command)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def vanishing_host() -> Iterator[VanishingHost]:
    """Make such a host for a `with` block; skip the test where that cannot be done."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the program ip")
    host = VanishingHost()
    try:
        try:
            host.make()
        except subprocess.CalledProcessError as exc:
            pytest.skip(f"no network namespace can be made here: {exc.stderr.decode().strip()}")
        yield host
    finally:
        host.remove()
