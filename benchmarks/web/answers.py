"""Checks that all stacks do the same work, by comparing answers and writes with the tables."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from .apps.shape import LIST, PAGE, TEN
from .database import Database
from .endpoints import ENDPOINTS
from .server import Server


class WrongAnswerError(AssertionError):
    """Says that a stack answers, or writes, something other than it should."""


def check(server: Server, database: Database, endpoints: Iterable[str] = ENDPOINTS) -> None:
    """Ask for some keys of each endpoint that the stack has.

    Raises:
        WrongAnswerError: an answer, or a row that was written, is wrong.
    """
    for name in endpoints:
        if server.stack.can(name):
            keys = ENDPOINTS[name].keys
            for key in sorted({1, (keys + 1) // 2, keys}):
                _check_one(server, database, name, key)


def _check_one(server: Server, database: Database, name: str, key: int) -> None:
    expected = _EXPECTED[name](database, key)
    before = _written(database, name, key)
    endpoint = ENDPOINTS[name]
    body = server.ask(f"/{name}/{key}", endpoint.method)
    answer = _plain(body.decode()) if name == "page" else json.loads(body)
    _compare(server, name, key, answer, expected)
    if before is not None:
        _compare(server, f"what {name} wrote", key, _written(database, name, key), before + 1)


def _compare(server: Server, what: str, key: int, found: object, expected: object) -> None:
    if found != expected:
        raise WrongAnswerError(
            f"{server.stack.name}, {what}, key {key}: {found!r:.1000} instead of {expected!r:.1000}"
        )


# --- What is expected ---------------------------------------------------------------------------

_ROW = "SELECT id, name, number, price, at FROM bench_row"


def _rows(database: Database, query: str, *parameters: Any) -> list[dict[str, Any]]:
    return [
        {"id": id_, "name": name, "number": number, "price": str(price), "at": at.isoformat()}
        for id_, name, number, price, at in database.rows(f"{_ROW} {query}", *parameters)
    ]


def _one(database: Database, key: int) -> Any:
    return _rows(database, "WHERE id = %s", key)[0]


def _ten(database: Database, key: int) -> Any:
    return {"rows": _rows(database, "WHERE id BETWEEN %s AND %s ORDER BY id", key, key + TEN[-1])}


def _list(database: Database, key: int) -> Any:
    return {"rows": _rows(database, "WHERE id > %s ORDER BY id LIMIT %s", key, LIST)}


def _two(database: Database, key: int) -> Any:
    return {"rows": _rows(database, "WHERE id BETWEEN %s AND %s ORDER BY id", key, key + 1)}


def _stream(database: Database, key: int) -> Any:
    rows, total = database.rows("SELECT count(*), sum(number) FROM bench_row")[0]
    return {"rows": rows, "total": total}


def _page(database: Database, key: int) -> Any:
    books = database.rows(
        "SELECT b.id, title, name FROM bench_book b JOIN bench_author a ON a.id = author_id "
        "WHERE b.id > %s ORDER BY b.id LIMIT %s",
        key,
        PAGE,
    )
    query = "SELECT stars, text FROM bench_review WHERE book_id = %s ORDER BY id"
    items = []
    for book, title, author in books:
        reviews = database.rows(query, book)
        lines = " ".join(f"<li>{stars} of 5: {text}</li>" for stars, text in reviews)
        items.append(f"<li> <h2>{title}</h2> <p>by {author}</p> <ol> {lines} </ol> </li>")
    return f"<!doctype html> <title>Books</title> <ul> {' '.join(items)} </ul>"


def _plain(page: str) -> str:
    """Normalise a page: templates may choose the blanks, and how a character is escaped."""
    return html.unescape(re.sub(r"\s+", " ", page)).strip()


_EXPECTED: dict[str, Callable[[Database, int], Any]] = {
    "one": _one,
    "ten": _ten,
    "list": _list,
    "update": lambda database, key: {"updated": 1},
    "insert": lambda database, key: {"inserted": True},
    "page": _page,
    "wait50": _two,
    "wait200": _two,
    "stream": _stream,
}
_WRITTEN = {
    "update": "SELECT number FROM bench_counter WHERE id = %s",
    "insert": "SELECT count(*) FROM bench_entry WHERE number = %s AND name = 'entry ' || number",
}


def _written(database: Database, name: str, key: int) -> int | None:
    """Return the number that a writing endpoint increases by one; None if it writes nothing."""
    return int(database.rows(_WRITTEN[name], key)[0][0]) if name in _WRITTEN else None
