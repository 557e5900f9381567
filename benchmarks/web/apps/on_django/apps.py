"""Names the application, and so its tables."""

from __future__ import annotations

from django.apps import AppConfig


class BenchConfig(AppConfig):
    name = "benchmarks.web.apps.on_django"
    label = "bench"
