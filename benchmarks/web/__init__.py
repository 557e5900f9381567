"""Measures pgbackend beside its peers, over HTTP.

``python -m benchmarks.web`` starts a PostgreSQL, installs the peers into an environment of their
own and lets all stacks answer the same requests, in turns; ``python -m benchmarks.web.report``
writes docs/benchmarks.md from the results.
"""
