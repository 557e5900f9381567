"""Shortcuts: they do the work of Django's functions in fewer steps, and can be switched off.

`registry` lists them, with the functions that each bypasses. ``python -m pgbackend.fast`` prints
which are on.
"""
