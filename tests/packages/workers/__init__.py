"""Tests queues with their real workers: tasks that use the ORM, sent from each context.

`settings.py` is the project of all three queues, `__main__.py` starts the workers and sends tasks:
``python -m tests.packages.workers``. See docs/packages.md.
"""
