"""System checks: wrong options; `threading.local` objects that were replaced, or could not be.

docs/checks.md lists their ids.
"""

from __future__ import annotations

from django.core import checks
from django.db import connections

from . import conf, options, thread_locals

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


def check_options(app_configs: object, **kwargs: object) -> list[checks.CheckMessage]:
    """Return an error for each wrong option of each alias; connects to no database.

    Returns a warning for an option that only sync code refuses.
    """
    messages: list[checks.CheckMessage] = []
    for alias in connections:
        if not (conf.alias_is_ours(alias) and conf.wrapper_is_ours(wrapper := connections[alias])):
            continue
        pool = connections.settings[alias]["OPTIONS"].get("pool")
        messages += [_said(checks.Error, each) for each in wrapper.option_problems()]
        messages += [
            _said(checks.Warning, each) for each in options.unusable_in_sync_code(alias, pool)
        ]
    return messages


def _said(
    kind: type[checks.Error | checks.Warning], problem: options.Problem
) -> checks.CheckMessage:
    return kind(problem.text, hint=problem.hint, id=problem.id)


def register() -> None:
    """Register the checks of this module with Django."""
    checks.register(check_options)
    checks.register(check_thread_locals)
