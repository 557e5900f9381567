"""The listening connection of one event loop and alias, which all its listeners share.

A `Hub` connects when its first listener comes, and closes the connection `LINGER` seconds after its
last listener has left. It belongs to no pool. Its one task sends LISTEN when a channel gets its
first listener, and UNLISTEN when it has lost its last.

When the connection is lost, the hub connects again by the rules of attempts.py, for as long as
somebody listens. When LISTEN is in force again, each listener is told a `Gap`. A link that dies
silently is noticed by the keepalives of connecting.py, and by a query each `HEARTBEAT` seconds:
behind a proxy only that reaches the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping, MutableMapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import psycopg

from . import connecting
from .asking import ConnectArguments
from .attempts import FAILURE_WINDOW, Attempts, forget_connecting, repeat
from .errors import PoolClosed
from .homes import AtHome
from .listening_link import Link
from .mailboxes import Mailbox, Notification
from .outages import LOG_INTERVAL, is_curable, is_unclear, one_line
from .refusals import is_refusing

logger = logging.getLogger("pgbackend.driver")

#: Seconds for which the connection stays open without listeners: the next one may come soon.
LINGER = 1.0

#: Seconds after which the server is asked whether it is still there.
HEARTBEAT = 30.0

#: The query that asks it: empty, and of use to a reader of ``pg_stat_activity``.
_HEARTBEAT = "-- pgbackend listens"

#: Seconds between attempts while the server refuses for a reason that does not pass by itself,
#: such as a wrong password, which some servers count.
_WRONG_SETTINGS_PAUSE = 5.0


class _RenewedError(Exception):
    """The connection is replaced, because `renew()` was called."""


@dataclass(frozen=True, slots=True)
class HubOptions:
    """Says how a hub connects."""

    #: Returns the arguments of `connect()`; called at each attempt.
    ask: Callable[[], Coroutine[Any, Any, Mapping[str, Any]]]
    #: Seconds after which `join()` gives up.
    timeout: float
    #: Seconds for which a new listener waits while a server restarts, say.
    grace: float
    #: The errors of `ask()` that are raised as they are.
    raised_as_is: tuple[type[Exception], ...] = ()


class Hub(AtHome):
    """Listens for any number of mailboxes, by one connection."""

    def __init__(
        self,
        name: str,
        options: HubOptions,
        loop: asyncio.AbstractEventLoop,
        siblings: MutableMapping[Any, Any],
        key: object,
    ) -> None:
        self.name, self.options, self.loop = name, options, loop
        self.thread = threading.get_ident()
        self.closed = False
        self.attempts = Attempts()
        self._siblings, self._key = siblings, key
        self._mailboxes: dict[Mailbox, None] = {}
        self._by_channel: dict[str, dict[Mailbox, None]] = {}
        self._link: Link | None = None
        self._stir = asyncio.Event()
        self._renewing = False
        #: When the connection was lost; None while there is one, and before the first.
        self._lost_at: float | None = None
        self._logged_at = 0.0
        self._began_at = self._pause_until = 0.0
        # It inherits nothing from the code that happens to listen first.
        self.task: asyncio.Task[None] = asyncio.Task(
            self._run(), loop=loop, name=f"pgbackend listens {name}", context=contextvars.Context()
        )
        self.task.add_done_callback(lambda _: self.close())  # it may be cancelled before it runs
        # A loop that is closed with tasks left closes the hub, too (loops.py).
        self.task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001

    # --- Listeners ---

    async def join(self, mailbox: Mailbox) -> None:
        """Fill `mailbox` from now on; return when LISTEN is in force for all its channels.

        Raises an error if it cannot be: the one with which the server refused, or
        `OperationalError` after the `timeout`.
        """
        if mailbox not in self._mailboxes and not mailbox.closed:
            self._mailboxes[mailbox] = None
            for channel in mailbox.channels:
                self._by_channel.setdefault(channel, {})[mailbox] = None
            self._stir.set()
        try:
            async with asyncio.timeout(self.options.timeout):
                await mailbox.ready()
        except TimeoutError:
            self.leave(mailbox)
            raise psycopg.OperationalError(
                f"could not listen on {self.name!r} within {self.options.timeout:g} s: the server "
                "does not answer"
            ) from self.attempts.failure

    def leave(self, mailbox: Mailbox) -> None:
        """Fill `mailbox` no more."""
        mailbox.close()
        self._forget(mailbox)

    def _forget(self, mailbox: Mailbox) -> None:
        if self._mailboxes.pop(mailbox, self) is self:
            return
        for channel in mailbox.channels:
            listeners = self._by_channel[channel]
            del listeners[mailbox]
            if not listeners:
                del self._by_channel[channel]
        self._stir.set()

    def leave_soon(self, mailbox: Mailbox) -> None:
        """Fill `mailbox` no more, soon. May be called in any thread, and in a finalizer."""
        if not self.closed:
            self.call_at_home(lambda: self.leave(mailbox))

    def _refuse(self, mailbox: Mailbox, error: Exception) -> None:
        self._forget(mailbox)
        mailbox.fail(error)

    def _heard(self, channel: str, payload: str, pid: int) -> None:
        notification = Notification(channel, payload, pid)
        for mailbox in self._by_channel.get(channel, ()):
            mailbox.put(notification)

    # --- The hub's task ---

    async def _run(self) -> None:
        try:
            while self._mailboxes:
                await self._connect()
                if self._link is not None:
                    await self._serve_until_lost(self._link)
        finally:
            # No await since the last look at the mailboxes: a later listener gets another hub.
            self.close()

    async def _serve_until_lost(self, link: Link) -> None:
        try:
            await self._serve(link)
        except (psycopg.Error, OSError, _RenewedError) as exc:
            self._note_lost(exc)
        finally:
            link.close()
            self._link = None

    def _note_lost(self, exc: Exception) -> None:
        for mailbox in self._mailboxes:
            mailbox.in_force = False
        self._lost_at = monotonic()
        if self._mailboxes and not isinstance(exc, _RenewedError):
            self._logged_at = self._lost_at
            logger.warning(
                "the connection that listens on %r was lost, and is opened again: %s",
                self.name,
                one_line(exc) or type(exc).__name__,
            )

    async def _serve(self, link: Link) -> None:
        """Listen by `link`; return when nobody has listened for a while."""
        while True:
            self._stir.clear()
            if link.failure is not None:
                raise link.failure
            if self._renewing:
                raise _RenewedError
            await self._update(link)
            idle = not self._mailboxes
            try:
                async with asyncio.timeout(LINGER if idle else HEARTBEAT):
                    await self._stir.wait()
            except TimeoutError:
                if idle and not self._mailboxes:
                    return
                await link.run(_HEARTBEAT)

    async def _update(self, link: Link) -> None:
        """Let `link` listen to the channels that have listeners; tell the new ones that it does."""
        gone, new = link.channels - {*self._by_channel}, {*self._by_channel} - link.channels
        if gone:
            link.channels -= gone
            await link.run(_commands("UNLISTEN", gone))
        if new:
            await self._listen(link, new)
        for mailbox in list(self._mailboxes):
            if not mailbox.in_force and mailbox.channels <= link.channels:
                mailbox.begin()

    async def _listen(self, link: Link, channels: Collection[str]) -> None:
        try:
            await link.run(_commands("LISTEN", channels))
        except psycopg.DataError as exc:  # the encoding of the database lacks a character
            if len(channels) > 1:
                for channel in channels:
                    await self._listen(link, [channel])
                return
            for channel in channels:
                for mailbox in list(self._by_channel.get(channel, ())):
                    self._refuse(mailbox, repeat(exc))
        else:
            link.channels.update(channels)

    # --- Connecting ---

    async def _connect(self) -> None:
        """Set `_link` to a connection that listens; return without if all listeners leave."""
        while self._mailboxes:
            await self._pause()
            began = self._began_at = self.attempts.begin()
            trial = connecting.Trial()
            self._renewing = False
            try:
                self._link = await self._open()
            except Exception as exc:
                forget_connecting(exc, Hub._update.__code__)
                self.attempts.note_failure(exc, began)
                self._note_failure(exc, await _is_curable(exc, trial.params))
            else:
                self._note_success()
                return

    async def _open(self) -> Link:
        arguments = ConnectArguments(await self.options.ask(), client_encoding="utf-8")
        arguments = connecting.arguments(arguments, self.options.timeout)
        link = await Link.open(arguments, self._heard, self._stir.set)
        try:
            await self._update(link)
        except BaseException:
            link.close()
            raise
        return link

    async def _pause(self) -> None:
        """Wait until another attempt may be made; one that shall tell a new listener comes sooner.

        A server that accepts connections, and closes each at once, is asked no more often.
        """
        soon = max(self.attempts.too_soon(), self._began_at + FAILURE_WINDOW - monotonic())
        if soon > 0:
            await asyncio.sleep(soon)
        while (left := self._pause_until - monotonic()) > 0 and all(
            mailbox.started for mailbox in self._mailboxes
        ):
            self._stir.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._stir.wait()

    def _note_failure(self, exc: Exception, curable: bool) -> None:
        """Tell the new listeners that wait why they cannot have a connection; the others wait."""
        now = monotonic()
        self._pause_until = 0.0 if curable else now + _WRONG_SETTINGS_PAUSE
        for mailbox in list(self._mailboxes):
            patient = curable and now - mailbox.asked_at < self.options.grace
            if not mailbox.started and not patient:
                self._refuse(mailbox, repeat(exc, self.options.raised_as_is))
        if self._lost_at is not None and now - self._logged_at >= LOG_INTERVAL:
            self._logged_at = now
            logger.warning(
                "the connection that listens on %r cannot be opened: %s", self.name, one_line(exc)
            )

    def _note_success(self) -> None:
        self.attempts.note_success()
        if self._lost_at is not None and self._logged_at >= self._lost_at:
            after = monotonic() - self._lost_at
            logger.warning("a connection listens on %r again, after %.1f s", self.name, after)
        self._lost_at = None

    # --- From outside ---

    def renew(self) -> None:
        """Replace the connection, if there is one; the listeners are told a gap."""
        self._renewing = self._link is not None
        self._stir.set()

    def close(self) -> None:
        """Close the connection, and end the task; the listeners that are left get `PoolClosed`."""
        if self.closed:
            return
        self.closed = True
        if self._siblings.get(self._key) is self:
            del self._siblings[self._key]
        for mailbox in self._mailboxes:
            mailbox.fail(PoolClosed(f"the connection that listens on {self.name!r} was closed"))
        if self._link is not None:
            self._link.close()
        if not self.loop.is_closed():
            self.task.cancel()

    def disown(self) -> None:
        """Send nothing more: after a fork, the connection is the parent's."""
        self.closed = True

    def open_connections(self) -> int:
        """Return 1 if the connection is open, else 0."""
        return int(self._link is not None and not self._link.closed)

    def described(self) -> str:
        """Return what the hub does, for the dump."""
        link = self._link
        where = "without a connection" if link is None else f"server process {link.pid}"
        listeners, channels = len(self._mailboxes), len(self._by_channel)
        return f"{where}, {listeners} listeners to {channels} channels"


async def _is_curable(exc: Exception, params: Mapping[str, Any]) -> bool:
    """Return whether a later attempt may succeed where this one failed with `exc`."""
    if is_curable(exc) or isinstance(exc, psycopg.errors.ReadOnlySqlTransaction | TimeoutError):
        return True  # a standby refuses LISTEN, until it is the primary
    return is_unclear(exc) and bool(params) and await is_refusing(params)


def _commands(verb: str, channels: Collection[str]) -> str:
    quoted = ('"' + channel.replace('"', '""') + '"' for channel in sorted(channels))
    return "; ".join(f"{verb} {name}" for name in quoted)
