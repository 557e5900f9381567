"""Hides what must not be read in public: passwords, and the names of hosts, users and databases.

`findings.shown` hides secrets from the operators of a project, who know the rest. A report is for
everybody, so here only values that are known to be harmless are shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from inspect import iscoroutinefunction
from typing import Any

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from .findings import HIDDEN, is_secret

#: The options whose texts are names that psycopg, libpq, Django or pgbackend define.
_WORDS = frozenset({
    "ENGINE", "PORT", "channel_binding", "client_encoding", "gssencmode", "load_balance_hosts",
    "pooler", "session_reset", "sslmode", "sslnegotiation", "target_session_attrs",
})  # fmt: skip
#: The options whose texts are connection strings.
_CONNINFO = frozenset({"conninfo", "dsn"})
#: Texts that everybody's settings have, and that messages need.
_COMMON = frozenset({"", "postgres", "default", "localhost", "127.0.0.1", "::1"})
#: The environment's variables of libpq, other than those that hold numbers or words.
_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGUSER", "PGDATABASE", "PGPASSWORD", "PGPASSFILE", "PGSERVICE")
#: Names of hosts, users and databases in messages of libpq, of servers, and of our own.
_IN_MESSAGES = (
    # The error of a function that stands for an option, at the end of its message.
    (re.compile(r"(is the cause of this one: \w+): .*", re.DOTALL), rf"\1: {HIDDEN}"),
    (re.compile(r'(?<=server at )"(?!localhost"|127\.0\.0\.1"|::1"|/)[^"]*"'), f'"{HIDDEN}"'),
    (re.compile(r'(?<=server at )"/[^"]*"'), '"(a directory)"'),
    (re.compile(r'(?<=on socket )"[^"]*"'), '"(a directory)"'),
    (
        re.compile(r'\b(user|role|database|host|host name|service|file|schema) "[^"]*"'),
        rf'\1 "{HIDDEN}"',
    ),
    (re.compile(r"\((?!127\.0\.0\.1\)|::1\))(\d+(\.\d+){3}|[\da-fA-F]*:[\da-fA-F:.]+)\)"), HIDDEN),
)  # fmt: skip


def publicly(name: str, value: Any) -> Any:
    """Return what everybody may read of the setting `name`."""
    if callable(value):
        return "a coroutine function" if iscoroutinefunction(value) else "a function"
    if is_secret(name) and value:
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): publicly(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [publicly("", each) for each in value]
    if _is_plain(value):
        return value
    return _of_text(name, value)


def _is_plain(value: Any) -> bool:
    return value is None or callable(value) or isinstance(value, int | float)


def _of_text(name: str, value: Any) -> Any:
    if name == "HOST":
        return _kind_of_host(str(value))
    if isinstance(value, str) and (name in _WORDS or not value):
        return value
    return HIDDEN if isinstance(value, str) else f"an object of {type(value).__name__}"


def _kind_of_host(hosts: str) -> str:
    """Return of each host of the list what it is, without its name."""
    return ", ".join(map(_kind, hosts.split(",")))


def _kind(host: str) -> str:
    if host.startswith(("/", "@")):
        return "a Unix socket"
    return "this machine" if host in _COMMON else "another host"


def mask(settings: Iterable[Mapping[str, Any]]) -> Callable[[str], str]:
    """Return a function that hides in a text whatever `settings` of aliases have to hide."""
    texts = {text for each in settings for text in _hidden_in("", each)}
    texts.update(os.environ[name] for name in _LIBPQ if os.environ.get(name))
    words = sorted(texts - {"", "127.0.0.1", "::1", "localhost"}, key=len, reverse=True)
    known = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words) or r"(?!)")

    def masked(text: str) -> str:
        for pattern, replacement in _IN_MESSAGES:
            text = pattern.sub(replacement, text)
        return known.sub(HIDDEN, text)

    return masked


def _hidden_in(name: str, value: Any) -> Iterator[str]:
    """Yield the texts in a setting that `publicly` does not show."""
    if name in _CONNINFO:
        yield from _of_conninfo(str(value))
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _hidden_in(str(key), each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _hidden_in("", each)
    elif is_secret(name):
        yield str(value or "")
    elif name not in _WORDS and not _is_plain(value):
        yield from {str(value), *(str(value).split(",") if name == "HOST" else ())} - _COMMON


def _of_conninfo(text: str) -> Iterator[str]:
    """Yield the values of a connection string, which messages may show one by one."""
    with suppress(ProgrammingError):  # no connection string: the check of the options says so
        yield from {str(value) for value in conninfo_to_dict(text).values()} - _COMMON
