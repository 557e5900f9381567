"""Loads a pool, and looks for foreign rows, lost money, and things that are never given back.

``python -m tests.soak`` lets 2,000 tasks share a pool of 5 connections. A fifth of their calls is
cancelled at a random moment. Each row that is read carries the nonce of its request; a bank's
accounts are read and written by transfers, and their sum must not change. A tenth of the calls
leaves something unfinished (an iterator, a cursor, a block, a COPY, a task) in one of the ways of
`tests/support/left_behind.py`, and goes on. With ``--kill`` a session is terminated on the server
every 50 ms.

The load comes in rounds. Each begins with a burst of 300 calls at once. After each, all is idle:
then the memory, the greenlets and the open files are counted. The exit status is 1 if a row was
wrong, money was lost, a connection is held, or one of these numbers has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextvars
import faulthandler
import gc
import itertools
import logging
import os
import random
import sys
import time
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

if __name__ == "__main__":
    django.setup()

import psycopg
from django.db import DatabaseError, connection, connections, transaction
from django.db.models import Sum, Value
from django.db.utils import DatabaseErrorWrapper
from greenlet import greenlet

import pgbackend
from pgbackend import aio
from tests.library.models import Book, Tag
from tests.support import left_behind
from tests.support.fixtures import pool_of_default
from tests.support.left_behind import Run
from tests.support.loops import LOOPS

ROWS = 25
ACCOUNTS = 20
#: Chance must not empty an account: ten minutes of transfers take up to some hundred from one.
BALANCE = 100_000

ROUNDS = 20
#: Seconds in which a round ends; code that blocks the loop for twice as long ends the run.
MOST_SECONDS = 90
BURST = 300

#: The limits at the end, and the growth of the memory that is allowed in the second half.
MOST_GREENLETS = 130
MOST_GROWTH = 1024 * 1024
#: Open files that come and go with connections.
MOST_FILES = 10


@dataclass(frozen=True)
class Sample:
    """Counts greenlets, memory and open files while there is nothing to do."""

    greenlets: int
    memory: int
    files: int

    def __str__(self) -> str:
        return (
            f"{self.greenlets} greenlets, {self.memory / 1e6:.2f} MB resident, "
            f"{self.files} open files"
        )


def sample() -> Sample:
    gc.collect()
    greenlets = sum(isinstance(thing, greenlet) for thing in gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(greenlets, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")))


@dataclass
class Result:
    """Counts the events of a run."""

    rows: int = 0
    wrong: int = 0
    cancelled: int = 0
    transfers: int = 0
    kills: int = 0
    left: int = 0
    warnings: int = 0
    #: Complaints that Django's own engine raises in the same place, see `_is_djangos()`.
    djangos: int = 0
    seconds: float = 0.0
    total: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    #: Faults of things left unfinished, and errors that the loop or Python would only have logged.
    faults: Counter[str] = field(default_factory=Counter)
    #: One sample before the first round, and one after each.
    samples: list[Sample] = field(default_factory=list)
    statistics: Any = None

    @property
    def growth(self) -> float:
        """Return by how many bytes the memory has grown in the second half.

        Medians are compared: a single sample may come when the allocator has just given pages back,
        or not.
        """
        memory = [each.memory for each in self.samples]
        half, few = len(memory) // 2, max(1, len(memory) // 10)
        middle = memory[half - few // 2 : half + few // 2 + 1]
        return median(memory[-few - 1 :]) - median(middle)

    def faults_found(self) -> list[str]:
        """Describe each fault of the run; return an empty list if all is well."""
        s, last = self.statistics, self.samples[-1]
        half = self.samples[len(self.samples) // 2]
        wrong = {
            f"{self.wrong} rows are wrong": self.wrong,
            f"the sum is {self.total}": self.total != ACCOUNTS * BALANCE,
            f"{s.leased} leases are left, {s.waiting} wait": s.leased or s.waiting,
            f"faults {dict(self.faults.most_common(10))}": self.faults,
            f"{last.greenlets} greenlets": last.greenlets >= MOST_GREENLETS,
            f"{last.files - half.files} more files": last.files - half.files > MOST_FILES,
            f"{self.growth / 1e6:.2f} MB more memory": self.growth >= MOST_GROWTH,
        }
        return [what for what, is_so in wrong.items() if is_so]


class Soak:
    def __init__(
        self,
        rows: int,
        tasks: int,
        cancelled: float,
        left: float,
        kill: bool,
        seed: object,
        pool: int,
    ) -> None:
        self.rows = rows
        self.tasks = tasks
        self.cancelled = cancelled
        self.left = left
        self.kill = kill
        self.random = random.Random(repr(seed))
        self.nonces = itertools.count(1)
        self.result = Result()
        #: The accounts are books: `saves` is the balance, so that no model is made for this alone.
        self.accounts: list[int] = []
        #: Tasks that are cancelled while they hold a connection.
        self.doomed: set[asyncio.Task[Any]] = set()
        #: The things left last, which are kept for a while; each thing in each of its ways.
        self.kept: deque[Any] = deque(maxlen=50)
        #: Some things hold one connection, and wait for a second: fewer of them at once than would
        #: hold all connections.
        self.leaving = asyncio.Semaphore(max(1, (pool - 1) // 2))
        self.ways = [(thing, way) for thing, way in left_behind.combinations() if not way.is_swept]
        #: The context of code that is unrelated to a task.
        self.outside = contextvars.copy_context()

    def prepare(self) -> None:
        """Write the rows and the accounts, in sync code."""
        from tests.library.models import Author

        Tag.objects.bulk_create(Tag(name=f"row {number}") for number in range(ROWS))
        left_behind.prepare()
        author = Author.objects.create(name="the bank")
        books = [
            Book(title=str(number), author=author, saves=BALANCE) for number in range(ACCOUNTS)
        ]
        self.accounts = [book.pk for book in Book.objects.bulk_create(books)]

    async def run(self) -> Result:
        started = time.monotonic()
        asyncio.get_running_loop().set_exception_handler(self._complain)
        killer = asyncio.create_task(self._kill_sessions()) if self.kill else None
        pgbackend.add_hook(self._leased)
        try:
            for _ in range(ROUNDS):
                faulthandler.dump_traceback_later(2 * MOST_SECONDS, exit=True)
                async with asyncio.timeout(MOST_SECONDS):
                    await self._round()
        except TimeoutError:
            self.result.faults[f"a round had not ended after {MOST_SECONDS} s"] += 1
            self.result.samples.append(sample())
        finally:
            pgbackend.remove_hook(self._leased)
        if killer is not None:
            killer.cancel()
            await asyncio.wait([killer])
        self.result.seconds = time.monotonic() - started
        faulthandler.dump_traceback_later(2 * MOST_SECONDS, exit=True)
        try:
            async with asyncio.timeout(MOST_SECONDS):
                self.result.total = await aio.run(self._total)
                inside = Tag.objects.filter(name__contains="inside")
                self.result.wrong += await aio.run(inside.count)
        except (TimeoutError, DatabaseError) as error:
            self.result.faults[f"no statement runs at the end: {error!r}"] += 1
        (self.result.statistics,) = pgbackend.statistics("default")
        return self.result

    def _total(self) -> int:
        for _ in range(10):  # sessions killed in the pool are noticed; one may be later
            try:
                return Book.objects.aggregate(total=Sum("saves"))["total"]
            except DatabaseError:
                continue
        raise AssertionError("the pool does not recover")

    async def _round(self) -> None:
        """Run a burst, then the load until its share of the rows is read; find leftovers."""
        if not self.result.samples:
            self.result.samples.append(sample())
        await asyncio.gather(*(self._burst() for _ in range(BURST)))
        rows = self.result.rows + self.rows // ROUNDS
        await asyncio.gather(*(self._one(rows) for _ in range(self.tasks)))
        self.kept.clear()
        self.result.samples.append(sample())

    async def _burst(self) -> None:
        try:
            await aio.run(self._read)
        except DatabaseError as error:
            if not self.kill:
                raise
            self.result.errors[type(error).__name__] += 1

    async def _one(self, rows: int) -> None:
        while self.result.rows < rows:
            if self._is(self.left):
                async with self.leaving:
                    await self._leave()
                continue
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

    async def _leave(self) -> None:
        """Leave something in the way of a sweep, and check that the next step simply works."""
        thing, way = self.random.choice(self.ways)
        places = [place for place in left_behind.PLACES if left_behind.fits(thing, way, place)]
        run = Run(
            *(thing, way, self.random.choice(_NEXTS), self.random.choice(places)),
            outside=self.outside,
        )
        task = run.start()
        self.result.left += 1
        await asyncio.wait([task])
        if way.when == left_behind.AFTER:
            way.happens(run)
        run.released.set()
        others = [*run.helpers, *run.children, *([run.neighbour] if run.neighbour else [])]
        if others:
            await asyncio.wait(others)
        for other in others:
            if not other.cancelled():
                other.exception()  # refusals are the matter of the tests
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None and not left_behind.may_raise(run, error):
            if not isinstance(error, DatabaseError) or not self.kill:
                name = f"{thing}, {way}, {run}: {type(error).__name__}: {error}"
                self.result.faults[name.partition("\n")[0][:200]] += 1
            else:
                self.result.errors[type(error).__name__] += 1
        self.kept.append(run.kept)

    def _complain(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.kill and isinstance(error, DatabaseError):
            self.result.errors[type(error).__name__] += 1
        elif not isinstance(error, transaction.TransactionManagementError):
            self.result.faults[f"the loop: {context['message']}: {error!r}"[:200]] += 1

    def unraisable(self, unraisable: Any) -> None:
        if _is_djangos(unraisable):
            self.result.djangos += 1
            return
        self.result.faults[f"unraisable: {unraisable.exc_value!r}"[:200]] += 1

    def warned(self, message: Any, category: Any, *args: Any) -> None:
        if issubclass(category, ResourceWarning):
            self.result.warnings += 1
        else:
            self.result.faults[f"{category.__name__}: {message}"[:200]] += 1

    def _cancel_soon(self, work: asyncio.Task[Any]) -> None:
        """Cancel `work` at a random moment, as it waits for a connection, or as it uses one."""
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
        tags = Tag.objects.filter(name__startswith="row ").annotate(nonce=Value(nonce))
        rows = list(tags.values_list("name", "nonce"))
        self.result.rows += len(rows)
        self.result.wrong += len(rows) != ROWS or any(row[1] != nonce for row in rows)

    def _transfer(self) -> None:
        source, target = self.random.sample(self.accounts, 2)
        with transaction.atomic():
            locked = Book.objects.select_for_update().order_by("pk")
            books = {book.pk: book for book in locked.filter(pk__in=[source, target])}
            # The value written is the one read, so a lost update or a torn transfer changes the
            # sum.
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


def _is_djangos(unraisable: Any) -> bool:
    """Return whether Django's own engine complains of the same.

    Python 3.13 may clear a `DatabaseWrapper` and its error wrapper before it closes an iterator of
    its cursor that is garbage too. So it is on `django.db.backends.postgresql`: when a thread
    leaves an iterator of `raw()` in a cycle, which is collected, leaves another one, and ends, then
    each later collection reports an error. Nothing is lost: the cursor has been closed before.
    """
    error = unraisable.exc_value
    return (
        isinstance(error, AttributeError)
        and isinstance(error.obj, DatabaseErrorWrapper)
        and error.name == "wrapper"
        and getattr(unraisable.object, "__qualname__", None) == "CursorWrapper.__iter__"
    )


#: `update` changes one row: with it, all things left in blocks would wait for each other.
_NEXTS = [step for step in left_behind.NEXTS if step is not left_behind.update]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tasks", type=int, default=2_000)
    parser.add_argument("--pool", type=int, default=5)
    # A fourth of the calls to cancel are cancelled before.
    parser.add_argument("--cancelled", type=float, default=0.28)
    parser.add_argument("--left", type=float, default=0.1, help="how much leaves something open")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--loop", choices=sorted(LOOPS), default="asyncio")
    options = parser.parse_args()
    from django.test.runner import DiscoverRunner

    from tests.server import server

    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        soak = Soak(
            *(options.rows, options.tasks, options.cancelled, options.left),
            *(options.kill, options.seed, options.pool),
        )
        soak.prepare()
        connection.close()
        # psycopg warns of each COPY that the garbage collector finds, which this load tries.
        logging.getLogger("psycopg").setLevel(logging.ERROR)
        sys.unraisablehook = soak.unraisable
        warnings.simplefilter("always")
        warnings.showwarning = soak.warned  # type: ignore[assignment]
        with pool_of_default(max_size=options.pool, timeout=60):
            with asyncio.Runner(loop_factory=LOOPS[options.loop]) as loop:
                result = loop.run(soak.run())
        faulthandler.cancel_dump_traceback_later()
    finally:
        runner.teardown_databases(databases)
        server.release()
    print(
        f"{result.rows:,} rows, {result.wrong} wrong; {result.transfers:,} transfers, sum "
        f"{result.total:,} of {ACCOUNTS * BALANCE:,}; {result.cancelled:,} cancelled, "
        f"{result.kills:,} sessions killed, errors {dict(result.errors)}; {result.seconds:.1f} s"
    )
    print(
        f"{result.left:,} times something was left, {result.warnings:,} warnings of it, "
        f"{result.djangos} complaints that Django's own engine raises too"
    )
    half = len(result.samples) // 2
    for name, number in (("beginning", 0), ("half time", half), ("end", -1)):
        print(f"{name}: {result.samples[number]}")
    print(result.statistics)
    faults = result.faults_found()
    growth = f"the memory grew by {result.growth / 1e6:.2f} MB in the second half"
    print(f"FAILED: {'; '.join(faults)}" if faults else f"PASSED: {growth}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
