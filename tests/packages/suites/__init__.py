"""Runs the own tests of packages on pgbackend: ``python -m tests.packages.suites``."""
