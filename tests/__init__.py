"""Holds the tests: see tests/README.md."""
