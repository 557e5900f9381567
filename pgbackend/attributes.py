"""Keep, for each request, the attributes that other code sets on `django.db.connection`.

Packages and projects set a tenant, the user of an audit, a flag that an operation is under way.
Django's own wrapper keeps them in its dictionary, and each thread has a wrapper of its own. Here a
request may use several wrappers: one in its thread, and one on the loop, which tasks share. So
attributes that are not the wrapper's own "follow the request": they are kept by context (see
request.py) and alias. All wrappers of one alias show the same values in a request, and a task's
changes are not seen outside the task. In sync code that no loop has started, the wrapper keeps the
attributes, as in Django.

Note [Attributes of a connection]
An attribute that a derived wrapper sets in its `_cursor()` is about the connection of the cursor:
"I have set the search path already". The value is in force on that connection only
(`_OfConnection`), because the request's next statement may run on another connection, where the
search path is not set.

Note [Attributes of the wrapper's own]
Some attributes stay as they are: those that Django's wrapper and pgbackend's have by themselves,
replacements of the wrapper's methods (by a debugging tool, a mock), and descriptors of derived
classes. An attribute that a derived wrapper sets in its `__init__` has that value until code sets
another in the request.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections

from . import request, state
from .driver import bridge
from .protocols import Wrapper

_plainly = object.__setattr__
_MISSING = object()


class _OfConnection:
    """The value of an attribute on one connection, and its value `before`, for all others."""

    __slots__ = ("before", "connection", "value")

    def __init__(self, value: object, before: object, connection: object) -> None:
        self.value = value
        self.before = before
        self.connection = connection

    def seen_by(self, wrapper: Wrapper) -> object:
        """Return the value for the connection that `wrapper` has in the running code."""
        if state.current_state(wrapper).connection is self.connection is not None:
            return self.value
        before = self.before
        return before.seen_by(wrapper) if type(before) is _OfConnection else before


def _set(self: Wrapper, name: str, value: object) -> None:
    if name in self.own_names:
        _plainly(self, name, value)
    else:
        _set_of_others(self, name, value)


def _get(self: Wrapper, name: str) -> object:
    if name not in self.own_names:
        value = _value_of(self, name)
        if value is not _MISSING:
            return value
    raise _missing(self, name)


def _delete(self: Wrapper, name: str) -> None:
    if name in self.own_names or name in self.__dict__:
        object.__delattr__(self, name)
    elif _value_of(self, name) is _MISSING:
        raise _missing(self, name)
    else:
        _put(self, name, _MISSING)


def _missing(wrapper: Wrapper, name: str) -> AttributeError:
    return AttributeError(f"{type(wrapper).__name__!r} object has no attribute {name!r}")


_METHODS = {"__setattr__": _set, "__getattr__": _get, "__delattr__": _delete}


def follow(wrapper: Wrapper) -> None:
    """Keep the attributes of `wrapper` by context from now on: change its class to one that does.

    The `__setattr__()` of the new class makes it slower to set any attribute, and each `atomic`
    sets several. So wrappers keep their class while only sync code that no loop started uses them.
    """
    cls: Any = type(wrapper)
    if cls.follows_request:
        return
    kept = vars(wrapper)
    others = [name for name in kept if name not in cls.own_names and not _is_patch(cls, name)]
    kept["_attributes"] = {name: kept.pop(name) for name in others}
    wrapper.__class__ = _following(cls)


@functools.cache
def _following(cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    namespace = {**names, **_METHODS, "__slots__": (), "follows_request": True}
    return type(cls)(cls.__name__, (cls,), namespace)


def _is_patch(cls: type[Any], name: str) -> bool:
    """Return whether setting `name` on an object replaces a method or a descriptor of `cls`."""
    found = _of_class(cls, name)
    return found is not _MISSING and (callable(found) or hasattr(type(found), "__get__"))


class _FollowingDefault:
    """A descriptor that replaces a class attribute, because code has set it on a wrapper.

    `_put()` keeps the values that are set; code that has set none sees `default`, the class's.
    """

    def __init__(self, name: str, default: object) -> None:
        self.name = name
        self.default = default

    def __get__(self, wrapper: Wrapper | None, cls: type[Any]) -> object:
        value = _MISSING if wrapper is None else _value_of(wrapper, self.name)
        return self.default if value is _MISSING else value

    def __set__(self, wrapper: Wrapper, value: object) -> None:
        _put(wrapper, self.name, value)

    def __delete__(self, wrapper: Wrapper) -> None:
        _put(wrapper, self.name, _MISSING)


def _set_of_others(wrapper: Wrapper, name: str, value: object) -> None:
    cls = type(wrapper)
    found = _of_class(cls, name)
    if type(found) is not _FollowingDefault:
        if _is_patch(cls, name):
            _plainly(wrapper, name, value)
            return
        if found is not _MISSING:
            setattr(cls, name, _FollowingDefault(name, found))
    _put(wrapper, name, value)


def _of_class(cls: type[Any], name: str) -> object:
    for each in cls.__mro__:
        if name in each.__dict__:
            return each.__dict__[name]
    return _MISSING


def _put(wrapper: Wrapper, name: str, value: object) -> None:
    """Set attribute `name` by context if `request.follows()`, or else on `wrapper`.

    The value `_MISSING` deletes the attribute.
    """
    if wrapper._noted and (noted := wrapper._noted.get(_who_runs())) is not None:
        noted.setdefault(name, _raw(wrapper, name))
    if request.follows() and _is_published(wrapper):
        owner = ("connection", wrapper.alias)
        request.change(owner, {**(request.values_of(owner) or {}), name: value})
    else:
        wrapper.__dict__["_attributes"] = {**wrapper._attributes, name: value}


def _is_published(wrapper: Wrapper) -> bool:
    """Return whether `django.db.connections` has `wrapper`: not while `__init__()` runs."""
    if wrapper._published:
        return True
    alias = wrapper.__dict__.get("alias")
    # `connections[alias]` would make a wrapper; Django's handler reads `_connections` in this way.
    known: Any = connections._connections  # type: ignore[attr-defined]  # noqa: SLF001
    if alias is None or getattr(known, alias, None) is not wrapper:
        return False
    wrapper.__dict__["_published"] = True
    return True


def _raw(wrapper: Wrapper, name: str) -> object:
    """Return attribute `name` as it is stored: maybe as an `_OfConnection`, or as `_MISSING`."""
    if request.follows() and _is_published(wrapper):
        values = request.values_of(("connection", wrapper.alias))
        if values is not None and name in values:
            return values[name]
    return wrapper._attributes.get(name, _MISSING)


def _value_of(wrapper: Wrapper, name: str) -> object:
    value = _raw(wrapper, name)
    return value.seen_by(wrapper) if type(value) is _OfConnection else value


@contextmanager
def of_connection(wrapper: Wrapper) -> Iterator[None]:
    """Bind the attributes that are set during this `with` to the connection that is used in it.

    See Note [Attributes of a connection].
    """
    who = _who_runs()
    noted: dict[str, Any] = {}
    outer = wrapper._noted.get(who)
    wrapper.__dict__["_noted"] = {**wrapper._noted, who: noted}
    try:
        yield
    finally:
        # Other tasks may have changed `_noted` meanwhile: the statement may have waited.
        others = {each: of_it for each, of_it in wrapper._noted.items() if each != who}
        wrapper.__dict__["_noted"] = others
        if noted and request.follows():
            connection = state.current_state(wrapper).connection
            for name, before in noted.items():
                _put(wrapper, name, _OfConnection(_raw(wrapper, name), before, connection))
        if outer is not None:
            wrapper.__dict__["_noted"] = {**others, who: outer}


def _who_runs() -> object:
    """Return a key that identifies the running portal, or the thread outside of portals."""
    return bridge.current() or threading.get_ident()


def names_of(cls: type[Any]) -> frozenset[str]:
    """Return the names of the attributes that a new object of `cls` has.

    The function makes such an object. It sets `follows_request` meanwhile, so that `follow()` does
    not change the object's class, even if a loop is running.
    """
    cls.follows_request = True
    try:
        return frozenset({*dir(cls), *vars(cls({}))})
    finally:
        cls.follows_request = False


class _Lender(request.Lender):
    """A `request.Lender` of the attributes that code has set on the wrappers of its thread."""

    def lend(self) -> request.Values:
        for each in _wrappers_of_thread():
            follow(each)
        return {
            ("connection", each.alias): each._attributes
            for each in _wrappers_of_thread()
            if each._attributes
        }

    def take_back(self, values: request.Values) -> None:
        for each in _wrappers_of_thread():
            kept = values.get(("connection", each.alias))
            if kept is not None:
                follow(each)
                each.__dict__["_attributes"] = kept


def _wrappers_of_thread() -> list[Any]:
    wrappers = connections.all(initialized_only=True)
    return [each for each in wrappers if hasattr(type(each), "own_names")]


request.lenders.append(_Lender())
