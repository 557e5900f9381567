"""Asks a server why it refuses new sessions, in a way that does not depend on its language.

libpq gives a failed attempt to connect no SQLSTATE, only the message of the server, which is in the
server's language. (`PQping()` would tell some refusals, but blocks the whole process in psycopg.)
So if nothing is known of a message, the server is asked once more, by a message of PostgreSQL's
protocol: a server that starts, shuts down or is full refuses it, with an SQLSTATE, before it asks
for a password. Nothing secret is sent, and no TLS is needed for that.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Mapping
from typing import Any

#: The SQLSTATEs of a server that will serve again: it ends, starts, or is full.
CURABLE = frozenset(("57P01", "57P02", "57P03", "53300"))

#: Seconds within which the server must answer.
LIMIT = 2.0

#: The longest answer that is read, in bytes.
_LONGEST = 10_000

_PROTOCOL_3 = 3 << 16
_ERROR = b"E"


async def is_refusing(params: Mapping[str, Any]) -> bool:
    """Return whether the server of `params` refuses all new sessions for now, or is down.

    Returns False if that is not known. `params` are those of libpq, for one host.
    """
    try:
        async with asyncio.timeout(LIMIT):
            reader, writer = await _connect(params)
            try:
                writer.write(_startup_message(params))
                return await _read_refusal(reader) in CURABLE
            finally:
                writer.close()
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except (OSError, ValueError, asyncio.IncompleteReadError):  # TimeoutError is an OSError
        return False


async def _connect(
    params: Mapping[str, Any],
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = str(params.get("host") or ""), int(params.get("port") or 5432)
    if host.startswith("/"):
        return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
    address = params.get("hostaddr") or host
    if not address:
        raise ValueError("the default host of libpq is not known")
    return await asyncio.open_connection(str(address), port)


def _startup_message(params: Mapping[str, Any]) -> bytes:
    user = str(params.get("user") or params.get("dbname") or "postgres")
    given = {"user": user, "database": str(params.get("dbname") or user)}
    texts = b"".join(f"{name}\0{value}\0".encode() for name, value in given.items())
    return struct.pack("!ii", len(texts) + 9, _PROTOCOL_3) + texts + b"\0"


async def _read_refusal(reader: asyncio.StreamReader) -> str | None:
    kind, length = struct.unpack("!ci", await reader.readexactly(5))
    if kind != _ERROR or not 4 <= length <= _LONGEST:
        return None
    fields = (await reader.readexactly(length - 4)).split(b"\0")
    return next((field[1:].decode("ascii") for field in fields if field[:1] == b"C"), None)
