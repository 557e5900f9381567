"""The pools of this process: one for each event loop and database, until the loop ends.

`get_pool()` finds or makes the pool of the running loop, and `get_hub()` the connection that
listens, which has the same lifetime. A pool ends with its loop: a runner like
`asyncio.run()` closes the async generators of its loop at the end, and this module keeps one in
each loop, which then closes the loop's pools. Pools of loops that were closed without that are
closed at the next call of a function here. `close_pools()` and `renew_pools()` reach the pools of
all loops, from any thread. A forked child forgets all pools.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Hashable
from functools import partial
from typing import Any

from .exits import stand_still_at_exit
from .forks import after_fork
from .listening import Hub, HubOptions
from .pool import Pool, PoolOptions
from .statistics import PoolStatistics
from .unpooled import forget_own_connections

#: Seconds that `close_pools()` waits until the thread of another loop has closed its pool.
CLOSE_TIMEOUT = 5.0


class _LoopPools:
    """Keeps the pools of one event loop, and closes them at the end of the loop."""

    def __init__(self) -> None:
        self.pools: dict[Any, Pool] = {}
        self.hubs: dict[Any, Hub] = {}
        # A runner closes the async generators of its loop: that is how the end is noticed.
        self._sentinel = self._close_with_loop()
        try:
            self._sentinel.__anext__().send(None)
        except StopIteration:
            pass

    async def _close_with_loop(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            tasks = [task for pool in self.pools.values() for task in pool.tasks]
            tasks += [hub.task for hub in self.hubs.values()]
            self.close()
            if tasks and asyncio._get_running_loop() is not None:
                await asyncio.wait(tasks)  # not for long: `close()` has cancelled them

    def both(self) -> list[Pool | Hub]:
        """Return the pools and the hubs."""
        return [*self.pools.values(), *self.hubs.values()]

    def close(self) -> None:
        """Close and forget the pools and the hubs."""
        for each in self.both():
            each.close()
        self.pools.clear()
        self.hubs.clear()


_by_loop: dict[asyncio.AbstractEventLoop, _LoopPools] = {}
#: Functions that are called each time when a pool or hub is made, on its loop's thread.
when_opened: list[Callable[[], None]] = []
#: The pools that a forked child inherited: kept alive, since their finalizers could write to the
#: parent's sockets.
_inherited: list[Any] = []


@after_fork
def _forget_pools() -> None:
    for loop_pools in _by_loop.values():
        for each in loop_pools.both():
            each.disown()
    _inherited.append(dict(_by_loop))
    _by_loop.clear()
    forget_own_connections()


def get_pool(key: tuple[Any, ...], name: str, options: Callable[[], PoolOptions]) -> Pool:
    """Return the pool for `key` on the running loop; make it from `options()` at first use.

    `key[0]` is the pool's owner, as in `close_pools(owner)`; `name` is for messages.
    """
    loop = asyncio.get_running_loop()
    try:
        return _by_loop[loop].pools[key]
    except KeyError:
        pass
    pools = _of_loop(loop).pools
    pool = pools.setdefault(key, Pool(name, options(), loop, pools))
    _tell_opened()
    return pool


def _of_loop(loop: asyncio.AbstractEventLoop) -> _LoopPools:
    _sweep()
    if loop not in _by_loop:
        _by_loop[loop] = _LoopPools()
        stand_still_at_exit(loop)
    return _by_loop[loop]


def _tell_opened() -> None:
    for opened in when_opened:
        opened()


def get_hub(key: tuple[Any, ...], name: str, options: Callable[[], HubOptions]) -> Hub:
    """Return the hub for `key` on the running loop; the arguments are as in `get_pool()`."""
    loop = asyncio.get_running_loop()
    hubs = _of_loop(loop).hubs
    if key not in hubs:
        hubs[key] = Hub(name, options(), loop, hubs, key)
        _tell_opened()
    return hubs[key]


def _sweep() -> None:
    """Close the pools of loops that were closed without closing their async generators."""
    for loop in list(_by_loop):  # other threads may add loops, or sweep
        if loop.is_closed() and (loop_pools := _by_loop.pop(loop, None)) is not None:
            loop_pools.close()


def close_pools(owner: Hashable) -> None:
    """Close the pools and hubs whose key begins with `owner`, on all loops, from any thread.

    On return their free connections are closed, unless the thread of a loop was busy for longer
    than `CLOSE_TIMEOUT`.
    """
    _sweep()
    for loop, loop_pools in list(_by_loop.items()):
        for each in (loop_pools.pools, loop_pools.hubs):
            for key in [key for key in list(each) if key[0] == owner]:
                _close_on(loop, each.pop(key))


def _close_on(loop: asyncio.AbstractEventLoop, pool: Pool | Hub) -> None:
    if loop is asyncio._get_running_loop() or not loop.is_running():
        pool.close()
        return
    closed = threading.Event()
    if pool.call_at_home(partial(_close_and_tell, pool, closed)):
        closed.wait(CLOSE_TIMEOUT)
    else:  # the loop was closed meanwhile
        pool.close()


def _close_and_tell(pool: Pool | Hub, closed: threading.Event) -> None:
    pool.close()
    closed.set()


def renew_pools(name: str | None = None) -> None:
    """Replace the open connections of all pools, on all loops: see `Pool.renew()`.

    `name` limits this to the pools of that name. May be called from any thread; each pool is
    renewed in the thread of its loop.
    """
    _sweep()
    for loop, loop_pools in list(_by_loop.items()):
        for pool in list(loop_pools.pools.values()):
            _renew(loop, pool, name)


def renew_hubs(name: str | None = None) -> None:
    """Replace the connections that listen, as `renew_pools()` replaces those of the pools."""
    _sweep()
    for loop, loop_pools in list(_by_loop.items()):
        for hub in list(loop_pools.hubs.values()):
            _renew(loop, hub, name)


def _renew(loop: asyncio.AbstractEventLoop, each: Pool | Hub, name: str | None) -> None:
    if name not in (None, each.name):
        return
    if loop is asyncio._get_running_loop() or not loop.is_running():
        each.renew()
    else:
        each.call_at_home(each.renew)


def open_pools() -> list[Pool]:
    """Return every open pool of this process, on all its loops. May be called from any thread."""
    return [
        pool
        for loop_pools in list(_by_loop.values())
        for pool in list(loop_pools.pools.values())
        if not pool.closed
    ]


def open_hubs() -> list[Hub]:
    """Return every hub of this process, on all its loops. May be called from any thread."""
    return [hub for each in list(_by_loop.values()) for hub in list(each.hubs.values())]


def statistics() -> list[PoolStatistics]:
    """Return the statistics of every open pool of this process, on all its loops."""
    return [pool.statistics() for pool in open_pools()]
