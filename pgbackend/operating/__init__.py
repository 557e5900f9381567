"""Tells an operator of the connections: the logic of `manage.py pgbackend`, and its socket."""
