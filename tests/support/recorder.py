"""Records the messages between a client and a pooler, and names those that pin a session.

A pooler shares its sessions among clients only while these leave nothing in them. RDS Proxy lists
the acts for which it gives a client a session of its own (it "pins" the client to it); PgBouncer
has no such list, and passes what is left behind on to the next client. `acts_of()` follows the list
for PostgreSQL, as far as SQL shows it.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.link import Link

#: The longest statement that RDS Proxy shares a session for, in bytes.
LONGEST = 16 * 1024

_STARTUP_CODES = {80877102: "CancelRequest", 80877103: "SSLRequest", 80877104: "GSSENCRequest"}
_NAMES = {
    "Q": "Query", "P": "Parse", "B": "Bind", "D": "Describe", "E": "Execute", "S": "Sync",
    "C": "Close", "H": "Flush", "X": "Terminate", "d": "CopyData", "c": "CopyDone",
    "f": "CopyFail", "p": "Password",
}  # fmt: skip

_SET = "changes a setting of the session"
_PREPARED = "uses a prepared statement of SQL"
_ACTS = {
    r"^SET\s+(?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b)": _SET,
    r"^RESET\b": _SET,
    r"\bset_config\s*\((?:[^()']|'[^']*'|\([^()]*\))*,\s*(?:false|'f')": _SET,
    r"^(?:PREPARE\s+(?!TRANSACTION\b)|EXECUTE\b|DEALLOCATE\b)": _PREPARED,
    r"^DISCARD\b": "discards the state of the session",
    r"^CREATE\s+(?:OR\s+REPLACE\s+)?(?:(?:GLOBAL|LOCAL)\s+)?TEMP": "creates a temporary object",
    r"^DECLARE\b.*\bWITH\s+HOLD\b": "declares a cursor WITH HOLD",
    r"^(?:UN)?LISTEN\b": "listens",
    r"^LOAD\b": "loads a library",
    r"\b(?:nextval|setval|currval|lastval)\s*\(": "manipulates a sequence",
    r"\bpg_(?:try_)?advisory_lock(?:_shared)?\s*\(": "takes an advisory lock of the session",
}
_PATTERNS = [(re.compile(text, re.IGNORECASE | re.DOTALL), act) for text, act in _ACTS.items()]
#: Text of SQL that is no code: quoted text, names, and comments. A quoted text is one part.
_PART = re.compile(
    r"'(?:[^']|'')*'|\"[^\"]*\"|\$(\w*)\$.*?\$\1\$|--[^\n]*|/\*.*?\*/|;|[^'\"$;/-]+|.", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a client; `text` is its SQL, or what else it says."""

    kind: str
    text: str = ""

    def acts(self) -> set[str]:
        """Return which acts of the message would pin a session."""
        return acts_of(self.text) if self.kind in ("Query", "Parse") else set()


def statements(sql: str) -> Iterator[str]:
    """Yield the statements of a text, without the comments before them."""
    parts: list[str] = []
    for found in _PART.finditer(sql):
        part = found[0]
        if part == ";":
            yield "".join(parts).strip()
            parts = []
        elif not part.startswith(("--", "/*")):
            parts.append(part)
    yield "".join(parts).strip()


def acts_of(sql: str) -> set[str]:
    """Return which acts of RDS Proxy's list the text `sql` contains."""
    found = {act for one in statements(sql) for pattern, act in _PATTERNS if pattern.search(one)}
    if len(sql.encode()) > LONGEST:
        found.add("is longer than 16 KB")
    return found


class _Parser:
    """Splits what one client sends into messages."""

    def __init__(self) -> None:
        self._data = b""
        self._has_started = False

    def feed(self, data: bytes) -> Iterator[Message]:
        self._data += data
        while (end := self._end()) is not None:
            message, self._data = self._data[:end], self._data[end:]
            yield self._typed(message) if self._has_started else self._startup(message)

    def _end(self) -> int | None:
        """Return where the first message ends; None if it has not come as a whole."""
        before = 1 if self._has_started else 0
        if len(self._data) < before + 4:
            return None
        (length,) = struct.unpack_from("!i", self._data, before)
        end = before + int(length)
        return end if len(self._data) >= end else None

    def _startup(self, message: bytes) -> Message:
        (code,) = struct.unpack_from("!i", message, 4)
        if code in _STARTUP_CODES:
            return Message(_STARTUP_CODES[code])
        self._has_started = True
        words = [word.decode() for word in message[8:].rstrip(b"\0").split(b"\0")]
        pairs = zip(words[::2], words[1::2], strict=False)
        return Message("Startup", ", ".join(f"{name}={value}" for name, value in pairs))

    def _typed(self, message: bytes) -> Message:
        kind = _NAMES.get(chr(message[0]), chr(message[0]))
        body = message[5:]
        if kind == "Query":
            return Message(kind, body.rstrip(b"\0").decode())
        if kind == "Parse":
            return Message(kind, body.split(b"\0")[1].decode())
        return Message(kind)


def _without_time_zone(startup: bytes) -> bytes:
    shorter = re.sub(rb"(?i)timezone\0[^\0]*\0", b"", startup)
    return struct.pack("!i", len(shorter)) + shorter[4:]


class Recorder(Link):
    """Relays to a pooler, and records all messages of all clients, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.messages: list[Message] = []
        #: Whether to drop the time zone of new connections, as a pooler may that knows none.
        self.drops_time_zone = False
        self._parsers: weakref.WeakKeyDictionary[Any, _Parser] = weakref.WeakKeyDictionary()
        super().__init__(*args, **kwargs)

    def _seen(self, pair: Any, data: bytes) -> bytes:
        if pair not in self._parsers and self.drops_time_zone:
            data = _without_time_zone(data)
        parser = self._parsers.setdefault(pair, _Parser())
        self.messages.extend(parser.feed(data))
        return data

    def clear(self) -> None:
        """Forget what was recorded until now."""
        self.messages.clear()

    def sql(self) -> list[str]:
        """Return the SQL that was sent, in order."""
        return [each.text for each in self.messages if each.kind in ("Query", "Parse")]

    def count(self) -> int:
        """Return how many round trips were made: messages that the server answers at once."""
        return sum(each.kind in ("Query", "Sync") for each in self.messages)

    def acts(self) -> set[str]:
        """Return the acts that would have pinned a session."""
        return {act for message in self.messages for act in message.acts()}


@contextmanager
def recorded(conninfo: str) -> Iterator[tuple[int, Counter[str]]]:
    """Record in another process, which tests that look for leftovers do not see.

    Yields the port, and a counter. At the end, the counter has the acts that would have pinned a
    session, each with the beginning of the first statement that did it.
    """
    acts: Counter[str] = Counter()
    with tempfile.TemporaryFile("w+") as found:
        command = [sys.executable, "-m", "tests.support.recorder", conninfo]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=found, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            yield int(process.stdout.readline()), acts
            process.stdin.close()
            acts.update(line.rstrip("\n") for line in process.stdout)


def main() -> None:
    """Record until the end of the standard input, and print the acts."""
    recorder = Recorder(sys.argv[1])
    print(recorder.port, flush=True)
    sys.stdin.read()
    recorder.close()
    for message in recorder.messages:
        for act in message.acts():
            print(f"{act}: {' '.join(message.text.split())[:100]}")


if __name__ == "__main__":
    main()
