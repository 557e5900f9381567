"""Runs a cluster of PostgreSQL on this machine, for the demonstration and for the tests.

Patroni with one primary and two standbys; HAProxy in front of them; PgBouncer in front of HAProxy.
``python -m proj.cluster`` (``make cluster``) serves the order desk on it: see docs/cluster.md.
"""
