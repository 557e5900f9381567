"""Runs the tests with each version of Python, Django and PostgreSQL: ``python -m tests.matrix``.

It needs the standard library only, since it makes the environments itself.
"""
