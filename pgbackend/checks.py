"""System checks: which `threading.local` objects pgbackend has replaced, and which it could not."""

from __future__ import annotations

from django.core import checks

from . import thread_locals

_CURE = (
    "Let its module keep it under one name, and other code refer to it by that name; or use "
    "'asgiref.local.Local', which follows requests by itself. If it is right to keep it by thread, "
    "add its name to PGBACKEND_THREAD_LOCALS['exclude']."
)


def check_thread_locals(app_configs: object, **kwargs: object) -> list[checks.CheckMessage]:
    """Return one message with all converted thread-locals, and a warning for each refused one."""
    messages: list[checks.CheckMessage] = []
    if thread_locals.converted:
        names = ", ".join(sorted(each.name for each in thread_locals.converted))
        messages.append(
            checks.Debug(f"Each threading.local follows the request: {names}.", id="pgbackend.D001")
        )
    for name, why in sorted(thread_locals.refused.items()):
        text = f"{name} is a threading.local that does not follow the request: {why}."
        messages.append(checks.Warning(text, hint=_CURE, id="pgbackend.W001"))
    return messages


def register() -> None:
    """Register the checks of this module with Django."""
    checks.register(check_thread_locals)
