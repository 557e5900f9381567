"""Values of connection options that functions return, such as passwords that change.

`PASSWORD`, `USER`, `HOST`, `PORT` and each of libpq's options in `OPTIONS` may be a function
without arguments, which is asked for the value at each connect. It may be a coroutine function.

- For an async pool, and in other green code, a coroutine function runs on the event loop. Another
  function may block, so it runs in a thread of its own.
- In sync code, a function is called in the thread that connects. A coroutine function is called by
  `async_to_sync()`.

The values are secrets: no error shows one, and no frame of an error keeps one.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from inspect import isawaitable, iscoroutinefunction
from typing import Any, TypeVar

from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation

from .driver import asking, bridge
from .driver.asking import ConnectArguments
from .driver.errors import OptionFailed
from .options import LIBPQ_NAMES, NOT_ASKED

T = TypeVar("T")

#: Errors of a function that are raised as they are; others become the cause of `OptionFailed`.
RAISED_AS_IS = (ImproperlyConfigured,)

#: The functions of the stack that have the parameters of a connection among their variables.
_WITH_PARAMETERS = {"connect", "get_connection_params", "get_new_connection", "guard"}


def is_asked(name: str, value: object) -> bool:
    """Return whether the connection option `name` is a function that is asked for the value."""
    return callable(value) and name not in NOT_ASKED


def resolve(
    alias: str, settings_dict: Mapping[str, Any], params: Mapping[str, Any]
) -> ConnectArguments:
    """Return the parameters of a connection, with values in the place of functions.

    Raises `OptionFailed`, with the function's exception as its cause, and `ImproperlyConfigured` if
    the function has returned what cannot be a value.
    """
    resolved = ConnectArguments(params)
    for name, function in params.items():
        if is_asked(name, function):
            resolved[name] = ask(_where(alias, name, settings_dict), function)
    return resolved


def resolve_settings(alias: str, settings_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings_dict` with values in the place of functions, for psql."""
    resolved = ConnectArguments(settings_dict)
    for key, name in LIBPQ_NAMES.items():
        if is_asked(name, settings_dict.get(key)):
            resolved[key] = ask(f"DATABASES[{alias!r}][{key!r}]", settings_dict[key])
    resolved["OPTIONS"] = resolve(alias, {}, settings_dict["OPTIONS"])
    return resolved


def _where(alias: str, name: str, settings_dict: Mapping[str, Any]) -> str:
    """Return which setting has given the connection option `name`, for messages."""
    for key, libpqs in LIBPQ_NAMES.items():
        if libpqs == name and settings_dict.get(key):
            return f"DATABASES[{alias!r}][{key!r}]"
    return f"DATABASES[{alias!r}]['OPTIONS'][{name!r}]"


def ask(where: str, function: Callable[[], Any]) -> Any:
    """Call `function`, which the setting `where` names, and return the value that it returns."""
    handled = sys.exception()
    try:
        value = _call(where, function)
    except (OptionFailed, SynchronousOnlyOperation, *RAISED_AS_IS) as exc:
        forget_variables(exc, handled)
        raise
    except Exception as exc:
        forget_variables(exc, handled)
        raise failure(where, exc) from exc
    if value is None or isinstance(value, str | int | float):
        return value
    kind = type(value).__name__
    del value  # the frame of the error must not keep it
    raise ImproperlyConfigured(
        f"The function {where} returned a {kind}. It must return a text, a number or None."
    )


def failure(where: str, exc: Exception) -> OptionFailed:
    """Return the error to raise from `exc`, with which the function `where` has ended."""
    return OptionFailed(
        f"could not connect: the function {where} failed, whose error is the cause of this one: "
        f"{type(exc).__name__}: {exc}"
    )


async def ask_in_thread(where: str, function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own, and return what it returns, of any kind.

    Raises the errors that `ask()` does.
    """
    try:
        return await asking.call_in_thread(where, function)
    except (OptionFailed, *RAISED_AS_IS) as exc:
        forget_variables(exc)
        raise
    except Exception as exc:
        forget_variables(exc)
        raise failure(where, exc) from exc


def _call(where: str, function: Callable[[], Any]) -> Any:
    if bridge.current() is not None:
        return bridge.await_(_call_on_loop(where, function))
    value = function()
    if not isawaitable(value):
        return value
    if (loop := asking.loop_of_thread()) is not None:  # asked for a pool, by a derived wrapper
        return asyncio.run_coroutine_threadsafe(_wait_for(value), loop).result()
    if asyncio._get_running_loop() is None:
        return async_to_sync(_wait_for)(value)
    if isinstance(value, Coroutine):
        value.close()
    raise SynchronousOnlyOperation(
        f"the coroutine function {where} cannot be called here, on the event loop and outside of "
        "pgbackend's greenlets: use 'await pgbackend.aio.run(fn)'"
    )


async def _call_on_loop(where: str, function: Callable[[], Any]) -> Any:
    if _is_coroutine_function(function):
        return await function()
    value = await asking.call_in_thread(where, function)
    return await value if isawaitable(value) else value


async def _wait_for(value: Awaitable[Any]) -> Any:
    return await value


def _is_coroutine_function(function: Any) -> bool:
    return iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)


# --- Frames of errors -----------------------------------------------------------------------------


def forget_variables(exc: BaseException, handled: BaseException | None = None) -> None:
    """Clear the variables of the frames in the tracebacks of `exc` and of its causes.

    The frames remain, and tell where the error was raised. Debug pages show variables of frames,
    and those of code that handles passwords may be secret. `handled` is an exception that other
    code was handling before, and is left alone.
    """
    for each in _chain(exc, handled):
        traceback.clear_frames(each.__traceback__)


def forget_parameters(exc: BaseException) -> None:
    """Clear the variables of those frames of `exc` that have the parameters of a connection."""
    for each in _chain(exc):
        trace = each.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_name in _WITH_PARAMETERS:
                try:
                    trace.tb_frame.clear()
                except RuntimeError:
                    pass  # it runs: the caller's own
            trace = trace.tb_next


def _chain(exc: BaseException, end: BaseException | None = None) -> list[BaseException]:
    """Return `exc` with its causes and contexts, each once, up to `end`."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [exc]
    while left:
        each = left.pop()
        if each is not None and each is not end and not any(each is one for one in found):
            found.append(each)
            left += [each.__cause__, each.__context__]
    return found
