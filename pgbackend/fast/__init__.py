"""Shortcuts: what is done in fewer steps than Django does it, and can be switched off.

`registry` names them, with the functions that each stands for. ``python -m pgbackend.fast`` prints
which are on.
"""
