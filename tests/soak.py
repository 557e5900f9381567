"""A load that looks for rows of others, and for money that was lost.

``python -m tests.soak`` lets 2,000 tasks share a pool of 5 connections. A fifth of what they do is
cancelled at a random moment. Each row that is read carries the nonce of its request; a bank's
accounts are read and written by transfers, whose sum must not change. With ``--kill`` a session is
terminated on the server every 50 ms. The exit status is 1 if a row was wrong or money was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

if __name__ == "__main__":
    django.setup()

import psycopg
from django.db import DatabaseError, connection, connections, transaction
from django.db.models import Sum, Value

import pgbackend
from pgbackend import aio
from tests.library.models import Book, Tag
from tests.support.fixtures import pool_of_default
from tests.support.loops import LOOPS

ROWS = 25
ACCOUNTS = 20
BALANCE = 100


@dataclass
class Result:
    """What was seen."""

    rows: int = 0
    wrong: int = 0
    cancelled: int = 0
    transfers: int = 0
    kills: int = 0
    seconds: float = 0.0
    total: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    statistics: Any = None

    @property
    def is_whole(self) -> bool:
        s = self.statistics
        return (
            not self.wrong and self.total == ACCOUNTS * BALANCE and (s.leased, s.waiting) == (0, 0)
        )


class Soak:
    def __init__(self, rows: int, tasks: int, cancelled: float, kill: bool, seed: object) -> None:
        self.rows = rows
        self.tasks = tasks
        self.cancelled = cancelled
        self.kill = kill
        self.random = random.Random(repr(seed))
        self.nonces = itertools.count(1)
        self.result = Result()
        #: The accounts are books: `saves` is the balance, so that no model is made for this alone.
        self.accounts: list[int] = []
        #: What is cancelled while it holds a connection.
        self.doomed: set[asyncio.Task[Any]] = set()

    def prepare(self) -> None:
        """Write the rows and the accounts, in sync code."""
        from tests.library.models import Author

        Tag.objects.bulk_create(Tag(name=f"row {number}") for number in range(ROWS))
        author = Author.objects.create(name="the bank")
        books = [
            Book(title=str(number), author=author, saves=BALANCE) for number in range(ACCOUNTS)
        ]
        self.accounts = [book.pk for book in Book.objects.bulk_create(books)]

    async def run(self) -> Result:
        started = time.monotonic()
        killer = asyncio.create_task(self._kill_sessions()) if self.kill else None
        pgbackend.add_hook(self._leased)
        try:
            await asyncio.gather(*(self._one() for _ in range(self.tasks)))
        finally:
            pgbackend.remove_hook(self._leased)
        if killer is not None:
            killer.cancel()
            await asyncio.wait([killer])
        self.result.seconds = time.monotonic() - started
        self.result.total = await aio.run(self._total)
        (self.result.statistics,) = pgbackend.statistics("default")
        return self.result

    def _total(self) -> int:
        for _ in range(10):  # sessions that were killed in the pool are noticed; one may be later
            try:
                return Book.objects.aggregate(total=Sum("saves"))["total"]
            except DatabaseError:
                continue
        raise AssertionError("the pool does not recover")

    async def _one(self) -> None:
        while self.result.rows < self.rows:
            work = asyncio.create_task(aio.run(self._transfer if self._is(0.2) else self._read))
            if self._is(self.cancelled):
                self._cancel_soon(work)
            await asyncio.wait([work])
            self.doomed.discard(work)
            if work.cancelled():
                self.result.cancelled += 1
            elif (error := work.exception()) is not None:
                if not isinstance(error, DatabaseError) or not self.kill:
                    raise error
                self.result.errors[type(error).__name__] += 1

    def _cancel_soon(self, work: asyncio.Task[Any]) -> None:
        """Cancel it at a random moment: of its wait for a connection, or of its use of one."""
        if self._is(0.3):
            asyncio.get_running_loop().call_later(self.random.random(), work.cancel)
        else:
            self.doomed.add(work)

    def _leased(self, event: Any) -> None:
        task = asyncio.current_task()
        if type(event).__name__ == "Leased" and task in self.doomed:
            asyncio.get_running_loop().call_later(self.random.random() * 0.003, task.cancel)

    def _is(self, probability: float) -> bool:
        return self.random.random() < probability

    def _read(self) -> None:
        nonce = next(self.nonces)
        rows = list(Tag.objects.annotate(nonce=Value(nonce)).values_list("name", "nonce"))
        self.result.rows += len(rows)
        self.result.wrong += len(rows) != ROWS or any(row[1] != nonce for row in rows)

    def _transfer(self) -> None:
        source, target = self.random.sample(self.accounts, 2)
        with transaction.atomic():
            locked = Book.objects.select_for_update().order_by("pk")
            books = {book.pk: book for book in locked.filter(pk__in=[source, target])}
            # Written as read, so that a lost update or a torn transfer changes the sum.
            for pk, amount in ((source, -1), (target, 1)):
                Book.objects.filter(pk=pk).update(saves=books[pk].saves + amount)
        self.result.transfers += 1

    async def _kill_sessions(self) -> None:
        name = connections.settings["default"]["NAME"]
        query = (
            "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity "
            f"WHERE datname = '{name}' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1) AS s"
        )
        async with await psycopg.AsyncConnection.connect(
            os.environ["DATABASE_URL"], autocommit=True
        ) as admin:
            while True:
                (count,) = await (await admin.execute(query)).fetchone()  # type: ignore[misc]
                self.result.kills += count
                await asyncio.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tasks", type=int, default=2_000)
    parser.add_argument("--pool", type=int, default=5)
    # A fourth of what is to be cancelled is done before.
    parser.add_argument("--cancelled", type=float, default=0.28)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--loop", choices=sorted(LOOPS), default="asyncio")
    options = parser.parse_args()
    from django.test.runner import DiscoverRunner

    from tests.server import server

    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        soak = Soak(options.rows, options.tasks, options.cancelled, options.kill, options.seed)
        soak.prepare()
        connection.close()
        with pool_of_default(max_size=options.pool, timeout=60):
            with asyncio.Runner(loop_factory=LOOPS[options.loop]) as loop:
                result = loop.run(soak.run())
    finally:
        runner.teardown_databases(databases)
        server.release()
    print(
        f"{result.rows:,} rows, {result.wrong} wrong; {result.transfers:,} transfers, sum "
        f"{result.total:,} of {ACCOUNTS * BALANCE:,}; {result.cancelled:,} cancelled, "
        f"{result.kills:,} sessions killed, errors {dict(result.errors)}; {result.seconds:.1f} s"
    )
    print(result.statistics)
    return 0 if result.is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
