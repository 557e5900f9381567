"""The state of this process, as `manage.py pgbackend status` shows it: only numbers and names."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from pgbackend import conf, metrics
from pgbackend.driver import loops

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


def threads() -> str:
    """Return the stacks of all threads if this process has no async pool, else an empty text.

    With one, `pgbackend.dump()` shows the stacks of the code that uses databases.
    """
    if loops.open_pools():
        return ""
    frames = sys._current_frames()  # noqa: SLF001 - documented
    return "".join(
        line
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and thread.ident in frames
        for line in _of_thread(thread.name, frames[thread.ident])
    )


def _of_thread(name: str, frame: FrameType) -> Iterator[str]:
    yield f"\nThread {name!r}\n"
    for place, line in reversed(list(traceback.walk_stack(frame))):
        code = place.f_code
        yield f'  File "{code.co_filename}", line {line}, in {code.co_name}\n'


def program() -> str:
    """Return the name of the program, without its arguments, which may contain secrets."""
    path = Path(sys.argv[0] if sys.argv else "")
    return path.parent.name if path.name == "__main__.py" else path.name
