"""The tests, by floor: see tests/README.md."""
