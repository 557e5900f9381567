"""The state of this process, as `manage.py pgbackend status` shows it: only numbers and names."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pgbackend import conf, metrics

from .versions import versions


def of_this_process(since: float) -> dict[str, Any]:
    """Return a description of this process for JSON; `since` is when it began to serve."""
    connections = metrics.connections()
    return {
        "pid": os.getpid(),
        "program": program(),
        "settings": conf.settings_module(),
        "serving_since": since,
        "versions": versions(),
        "connections": {
            **asdict(connections),
            "open": connections.open,
            "max": connections.max,
        },
        "pools": [asdict(record) for record in metrics.statistics()],
    }


def program() -> str:
    """Return the name of the program, without its arguments, which may contain secrets."""
    path = Path(sys.argv[0] if sys.argv else "")
    return path.parent.name if path.name == "__main__.py" else path.name
