"""Runs some modules of Django's suite, in one context, in a process of its own.

The process runs in Django's directory ``tests``, with its ``runtests.py``. That does everything as
usual; only the class of results is ours. In the contexts green and whole all runs in a portal, and
in the context whole the requests of the tests come through the whole stack (whole_stack.py).
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .results import ON_A_LOOP, read


def main(settings: str = "tests.suite.settings", run: Callable[..., None] | None = None) -> int:
    """Do the job of `SUITE_JOB`: call `run`, by default Django's runner, in the job's context."""
    run = run or _run
    job = json.loads(os.environ["SUITE_JOB"])
    _make_temporary_directory()
    os.environ["DJANGO_SETTINGS_MODULE"] = settings

    from .recorder import Journal, Watchdog

    faulthandler.enable()
    done = read(Path(job["journal"])).begun
    journal = Journal(Path(job["journal"]))
    watchdog = Watchdog(journal, job["timeout"])
    sys.unraisablehook = journal.note_unraisable
    guard = _install_guard(job, journal)
    try:
        if job["context"] in ON_A_LOOP:
            asyncio.run(_run_green(run, job, journal, watchdog, guard, done))
        else:
            run(job, journal, watchdog, guard, done)
    finally:
        watchdog.stop()
        if guard is not None:
            counts, left_open = dict(guard.connections), guard.left_open()
            print(f"connections: {counts}; left open: {left_open}")
            journal.write("connections", counts=counts)
    journal.write("finished")
    return 0


def _make_temporary_directory() -> None:
    # runtests.py does the same when it is the program.
    directory = tempfile.mkdtemp(prefix="django_")
    tempfile.tempdir = os.environ["TMPDIR"] = directory
    atexit.register(shutil.rmtree, directory, ignore_errors=True)


def _install_guard(job: dict[str, Any], journal: Any) -> Any:
    if job["context"] == "stock":
        return None
    from .guard import Guard

    guard = Guard(journal, green=job["context"] in ON_A_LOOP)
    guard.install()
    return guard


async def _run_green(
    run: Callable[..., None], job: dict[str, Any], journal: Any, *args: Any
) -> None:
    from pgbackend import aio

    asyncio.run = _run_in_a_thread  # type: ignore[assignment]
    asyncio.get_running_loop().set_exception_handler(journal.note_complaint)
    await aio.run(run, job, journal, *args)


def _run_in_a_thread(main: Any, **options: Any) -> Any:
    """Replace `asyncio.run()`, which a test may call in the belief that no loop runs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_ASYNCIO_RUN, main, **options).result()


_ASYNCIO_RUN = asyncio.run


def _run(
    job: dict[str, Any], journal: Any, watchdog: Any, guard: Any, done: Collection[str]
) -> None:
    import runtests  # Django's; importing it makes warnings errors

    from .recorder import make_runner

    def get_runner(settings: Any) -> Any:
        # runtests calls this after Django has been set up; only then may the backend be imported.
        if guard is not None:
            guard.install_wrapper()
        if job["context"] == "whole":
            from . import whole_stack

            whole_stack.install()
        return make_runner(journal, watchdog, done)

    watchdog.watch()
    runtests.get_runner = get_runner
    runtests.django_tests(
        verbosity=1,
        interactive=False,
        failfast=False,
        # PgBouncer keeps sessions open, which a database cannot be dropped under.
        keepdb=job["pooler"] is not None,
        reverse=False,
        test_labels=job["labels"],
        debug_sql=False,
        parallel=1,
        tags=None,
        exclude_tags=None,
        test_name_patterns=None,
        start_at=None,
        start_after=None,
        pdb=False,
        buffer=False,
        timing=True,
        shuffle=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
