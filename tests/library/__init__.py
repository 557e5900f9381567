"""Holds a small ordinary Django app, which knows nothing of pgbackend: tests switch its ENGINE."""
