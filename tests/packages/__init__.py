"""Tests packages as released, each in a small project of its own: their state follows requests.

A file `with_*.py` is a project: settings, models, and a request of a user. Its process (`run.py`)
plays the same matrix for all projects: sync and async middleware around the package's, sync and
async views, work alone, under `gather()` and in a TaskGroup. See docs/packages.md.

`own_suite.py` runs the tests that come with django-tenants, in `own_suite_project`.
"""
