"""System checks: which `threading.local` objects pgbackend has replaced, and which it could not."""

from __future__ import annotations

from django.core import checks

from . import thread_locals

_CURE = (
    "Keep the object in one module, under one name, and let other code look it up there; or use "
    "'asgiref.local.Local', which follows requests by itself. If each thread shall have its own "
    "values, as without pgbackend, add the name to PGBACKEND_THREAD_LOCALS['exclude']."
)


def check_thread_locals(app_configs: object, **kwargs: object) -> list[checks.CheckMessage]:
    """Return a message that names the replaced thread-locals, and a warning for each refused."""
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
