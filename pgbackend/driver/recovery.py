"""Recovery of a connection whose statement was interrupted: cancel, read the rest, or close it.

The whole recovery takes `CLEANUP_BUDGET` seconds at most, so that a user's timeout holds on a
silent link, too. If the task was cancelled, the server is asked to cancel the statement, and the
rest of its reply is read in a separate task, which no further cancellation interrupts. Where
nothing can be waited for (in a closed portal, at the end of the process) the socket is closed at
once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator
from time import monotonic
from typing import Any

import psycopg
from psycopg import errors as e
from psycopg import waiting
from psycopg._connection_base import BaseConnection
from psycopg.abc import PQGen
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.pq.abc import PGconn

from .bridge import Portal, current
from .cancellation import finish

logger = logging.getLogger("pgbackend.driver")

#: Seconds for all of the clean-up after a cancellation: cancel on the server, read the rest of
#: the reply, roll back. After that the socket is closed. psycopg would take 5 s + 5 s.
CLEANUP_BUDGET = 0.8

#: Seconds after which a wait of psycopg's checks the socket again, even without an event.
WAIT_INTERVAL = 0.1
#: Seconds after which the server is asked once more to cancel.
_CANCEL_INTERVAL = 0.2
_ACTIVE = TransactionStatus.ACTIVE
_NO_PIPELINE = PipelineStatus.OFF


def is_at_rest(pgconn: PGconn) -> bool:
    """Return whether no statement and no pipeline is in flight on a connection."""
    return pgconn.transaction_status != _ACTIVE and pgconn.pipeline_status == _NO_PIPELINE


def recover(
    connection: psycopg.Connection[Any], portal: Portal, gen: PQGen[Any], exc: BaseException
) -> None:
    """End the statement that `exc` has interrupted: cancel it, or close `connection`.

    Closes it at once if `exc` is no cancellation, or if `portal` is being closed and cannot wait;
    else only if the statement does not end in time, or was sent in a pipeline. `gen` is psycopg's
    generator that runs the statement, in `portal`.
    """
    pipelined = connection.pgconn.pipeline_status != _NO_PIPELINE
    if portal.closing or not isinstance(exc, asyncio.CancelledError):
        cut_off(connection.pgconn, gen)
        return
    held = portal.pending
    finish(_cancel_and_drain(connection, gen), CLEANUP_BUDGET)
    # Drop a second cancellation, since the first one, `exc`, is being raised already.
    portal.pending = held
    if connection.pgconn.transaction_status == _ACTIVE or pipelined:
        logger.info("closing a connection whose statement did not end with its cancellation")
        cut_off(connection.pgconn, gen)


def cut_off(pgconn: PGconn, gen: PQGen[Any]) -> None:
    """Close the socket first, and then `gen`.

    In the other order, a `gen` that uses a pipeline would still send a message to end it.
    """
    pgconn.finish()
    with contextlib.suppress(psycopg.Error):
        gen.close()


async def _cancel_and_drain(connection: psycopg.Connection[Any], gen: PQGen[Any]) -> None:
    """Ask the server again and again to cancel the statement, until its reply has been read.

    The error by which the statement ends is not raised. The caller limits the time.
    """
    try:
        while not await _cancel_once(connection, gen):
            pass
    except e.QueryCanceled:
        pass
    except psycopg.Error as exc:
        logger.debug("error ignored in the clean-up of a cancelled statement: %s", exc)


async def _cancel_once(connection: psycopg.Connection[Any], gen: PQGen[Any]) -> bool:
    """Ask the server once to cancel the statement; return False if the caller must ask again.

    Returns False if the statement has not ended after `_CANCEL_INTERVAL` seconds: the request may
    have reached the server before the statement did. Raises the error by which the statement ended,
    mostly `QueryCanceled`. Returns True if it ended without an error, or is in a pipeline: there,
    its reply is not waited for.
    """
    pgconn = connection.pgconn
    await ask_to_cancel(connection, CLEANUP_BUDGET)
    if pgconn.pipeline_status != _NO_PIPELINE:
        return True  # the rest is answered only after a Sync, which is not sent
    try:
        await waiting.wait_async(gen, pgconn.socket, WAIT_INTERVAL, _CANCEL_INTERVAL)
    except e._WaitTimeout:  # noqa: SLF001 - psycopg's own
        return False
    return True


async def ask_to_cancel(connection: BaseConnection[Any], timeout: float) -> None:
    """Ask the server to cancel the statement; raise `CancellationTimeout` after `timeout` s."""
    if not psycopg.capabilities.has_cancel_safe():
        await asyncio.to_thread(connection.cancel)
        return
    gen = connection._cancel_gen()  # noqa: SLF001 - psycopg's
    try:
        await waiting.wait_conn_async(gen, interval=WAIT_INTERVAL, timeout=timeout)
    except e._WaitTimeout:  # noqa: SLF001 - psycopg's own
        raise e.CancellationTimeout("cancellation timeout expired") from None
    finally:
        # It has a socket of its own, which the traceback of an interruption would keep open.
        gen.close()


async def cancel_while_locked(connection: psycopg.Connection[Any]) -> None:
    """Ask the server again and again to cancel the statement, until `connection.lock` is free."""
    pgconn, lock = connection.pgconn, connection.lock
    with contextlib.suppress(psycopg.Error):
        while (
            lock.locked()
            and pgconn.transaction_status == _ACTIVE
            and not getattr(connection, "spares_statement", False)
        ):
            await ask_to_cancel(connection, CLEANUP_BUDGET)
            # Then ask again: the request may have reached the server before the statement did.
            until = monotonic() + _CANCEL_INTERVAL
            while lock.locked() and monotonic() < until:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)


@contextlib.contextmanager
def limit_clean_up(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Let psycopg's own clean-up, inside this `with`, wait for at most `CLEANUP_BUDGET` seconds.

    psycopg itself would wait for a silent server for ever. If the statement has not ended when the
    `with` ends, the connection is closed. Does nothing outside green code.
    """
    if current() is None:
        yield
        return
    patched = vars(connection)  # on the object: a check in `wait()` would slow all statements
    patched["wait"] = functools.partial(connection.wait, timeout=CLEANUP_BUDGET)
    try_cancel = connection._try_cancel  # noqa: SLF001 - psycopg's
    patched["_try_cancel"] = functools.partial(try_cancel, timeout=CLEANUP_BUDGET)
    try:
        yield
    finally:
        del patched["wait"], patched["_try_cancel"]
        if connection.pgconn.transaction_status == _ACTIVE:
            connection.close()
