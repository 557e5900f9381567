"""Starts the workers, sends tasks from each context, and stops the workers by SIGTERM.

Prints a JSON object: for each queue its version, the errors of the cases that failed in each
context, and what its worker said from its start to its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import django
from asgiref.sync import sync_to_async

from tests.packages.project import STOCK, database, execute, green


@contextmanager
def project() -> Iterator[Path]:
    """Make the database and its tables, and the folder of Celery's queue."""
    with tempfile.TemporaryDirectory() as folder, database():
        for name in ("queue", "control", "results"):
            (Path(folder) / name).mkdir()
        os.environ["PACKAGES_FOLDER"] = folder
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.packages.workers.settings"
        django.setup()
        from django.core.management import call_command

        call_command("migrate", run_syncdb=True, verbosity=0)
        yield Path(folder)


class Worker:
    """Runs the worker of a queue, and keeps what it says."""

    def __init__(self, arguments: list[str], said: Path) -> None:
        self.said = said
        with said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "always::ResourceWarning", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def stop(self, by_task: Callable[[], Any] | None) -> dict[str, Any]:
        """Stop the worker as a service manager does, or by a task; return how it ended."""
        if by_task is not None:
            by_task()
        else:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        return {"status": status, "said": self.said.read_text()}


def fault(case: Any, run: Any) -> str | None:
    try:
        run(case)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"[:600]
    return None


def results(queue: Any) -> dict[str, dict[str, str | None]]:
    from tests.packages.workers import cases

    async_cases = cases.ASYNC_CASES + ([] if STOCK else cases.ASYNC_CASES_HERE)
    runs: dict[str, tuple[list[Any], Any]] = {
        "sync": (cases.CASES, lambda case: case(queue)),
        "green": (cases.CASES, lambda case: asyncio.run(green(case, queue))),
        "async": (async_cases, lambda case: asyncio.run(case(queue))),
    }
    if STOCK:
        del runs["green"]
    return {
        context: {case.__name__: fault(case, run) for case in tried}
        for context, (tried, run) in runs.items()
    }


def sessions_end() -> bool:
    """Return whether the server ends all sessions of the database, soon after the workers' end."""
    find = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    deadline = time.monotonic() + 5
    while execute(find) != [(0,)]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    said: dict[str, Any] = {}
    with project() as folder:
        from django.db import connections

        from tests.packages.workers.celery_app import app
        from tests.packages.workers.queues import QUEUES

        app.set_default()
        workers = {
            name: Worker(queue.worker, folder / f"{name}.txt") for name, queue in QUEUES.items()
        }
        try:
            for name, queue in QUEUES.items():
                version = metadata.version(queue.package)
                said[name] = {
                    "package": queue.package,
                    "version": version,
                    "results": results(queue),
                }
        finally:
            ends = {name: worker.stop(QUEUES[name].stop) for name, worker in workers.items()}
        connections.close_all()
        asyncio.run(sync_to_async(connections.close_all)())  # those of the async cases' thread
        for name, end in ends.items():
            said[name]["worker"] = end
        said["sessions_end"] = sessions_end()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
