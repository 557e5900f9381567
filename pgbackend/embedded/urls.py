"""Database URLs: `database_settings` turns one into an entry of Django's ``DATABASES``."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

_BAD_URL = (
    "malformed database URL (not shown, it may hold a password): expected "
    "postgresql://USER:PASSWORD@HOST:PORT/NAME?option=value, with special characters of each "
    "part percent-encoded"
)


def database_settings(url: str) -> dict[str, Any]:
    """Turn ``postgresql://USER:PASSWORD@HOST:PORT/NAME?option=value`` into a ``DATABASES`` entry.

    ``postgres://`` is taken too. Each part may be percent-encoded and may be missing; it is then
    ``""``. A socket directory is given as ``?host=/run/dir`` or percent-encoded as HOST. Several
    hosts stand as ``a:1,b:2``. Of the query, ``host``, ``port``, ``user``, ``password`` and
    ``dbname`` replace the part of the same meaning, and all else goes to ``OPTIONS``, as text
    except for ``pool`` and ``server_side_binding`` (``true`` or ``false``) and ``isolation_level``
    and ``prepare_threshold`` (a number), which are no options of libpq's.

    Returns:
        NAME, USER, PASSWORD, HOST, PORT and, if there are any, OPTIONS; no ENGINE.

    Raises:
        ValueError: the URL is malformed; the text is fixed and shows nothing of the URL.
    """
    try:
        return _parse_url(url)
    except ValueError:
        # Not chained: the cause may hold a part of the password.
        raise ValueError(_BAD_URL) from None


def _parse_url(url: str) -> dict[str, Any]:
    # Not urlsplit: it takes '#' for a fragment, refuses several hosts and repairs bad encodings.
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgres", "postgresql") or "://" not in url:
        raise ValueError
    rest, _, query = rest.partition("?")
    authority, _, name = rest.partition("/")
    userinfo, _, netloc = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    options = _parse_query(query)
    hosts, ports = _parse_hosts(netloc)
    parts = {
        "NAME": options.pop("dbname", _decode(name)),
        "USER": options.pop("user", _decode(user)),
        "PASSWORD": options.pop("password", _decode(password)),
        "HOST": options.pop("host", hosts),
        "PORT": options.pop("port", ports),
    }
    _check_ports(parts["PORT"])
    entry: dict[str, Any] = dict(parts)
    if options:
        entry["OPTIONS"] = {name: _option_value(name, text) for name, text in options.items()}
    return entry


def _parse_query(query: str) -> dict[str, str]:
    pairs = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not name or not equals:
            raise ValueError
        pairs[_decode(name)] = _decode(value)
    return pairs


def _parse_hosts(netloc: str) -> tuple[str, str]:
    hosts, ports = [], []
    for one in netloc.split(","):
        match = re.fullmatch(r"(?:\[([^]]*)\]|([^:\[\]]*))(?::(\d*))?", one)
        if match is None:
            raise ValueError
        hosts.append(_decode(match[1] or match[2] or ""))
        ports.append(match[3] or "")
    return ",".join(hosts), ",".join(ports) if any(ports) else ""


def _check_ports(ports: str) -> None:
    for port in filter(None, ports.split(",")):
        if not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
            raise ValueError


def _decode(text: str) -> str:
    if re.search(r"%(?![0-9A-Fa-f]{2})|%00|\x00", text):
        raise ValueError
    return unquote(text, errors="strict")


def _option_value(name: str, text: str) -> str | bool | int:
    # These are compared with `is True` or counted with; as text they would be ignored or break.
    if name in ("pool", "server_side_binding"):
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"
    if name in ("prepare_threshold", "isolation_level"):
        return int(text)
    return text
