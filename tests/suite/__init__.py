"""Runs Django's own test suite on pgbackend and on the stock backend.

``python -m tests.suite`` takes the suite of the installed Django from its source distribution and
runs it in three contexts, each in processes of its own:

- ``stock``  ``django.db.backends.postgresql``: the reference;
- ``sync``   ``pgbackend`` where no event loop runs (contract C2);
- ``green``  ``pgbackend`` with the whole run inside a greenlet on an event loop: databases are
  made, classes and tests set up, run and torn down there, and async tests run on that same loop.

The outcome of each test is compared with stock's. A difference that is not listed in `differences`,
or is listed without need, makes the exit status 1.
"""
