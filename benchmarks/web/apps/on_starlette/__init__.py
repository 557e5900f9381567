"""Holds the stacks without Django: one Starlette application, over the queries of each module."""
