"""Runs django-tenants' own tests in one context, as a worker of tests/suite runs Django's.

The file has the name of a project's command because the tests look for a file of this name.
"""

import django
from asgiref.sync import async_to_sync, sync_to_async

from tests.suite.worker import main


def run(job, journal, watchdog, guard, done):
    from tests.suite.recorder import make_runner

    django.setup()
    if guard is not None:
        guard.install_wrapper()
    watchdog.watch()
    runner = make_runner(journal, watchdog, done)(interactive=False)
    drop_databases = runner.teardown_databases

    def close_and_drop(*args):
        async_to_sync(close_all)()
        drop_databases(*args)

    runner.teardown_databases = close_and_drop
    runner.run_tests(job["labels"])


@sync_to_async
def close_all():
    """Close the connections that the sync middleware of an AsyncClient's request has opened.

    The client keeps them from being closed at the end of the request. Green, they belong to
    asgiref's thread, and so they do for stock below a runner of async tests.
    """
    from django.db import connections

    connections.close_all()


if __name__ == "__main__":
    raise SystemExit(main("dts_test_project.settings", run))
