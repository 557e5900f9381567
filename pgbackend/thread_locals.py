"""Replace each `threading.local` of packages and of the project by one that follows the request.

Modules are searched for `threading.local` objects when the apps are ready, when middleware is
loaded, and when a request has loaded modules: in their globals, in the attributes of their classes,
and in the attributes of objects that are globals. Each such object is converted: it is replaced,
wherever something refers to it, by an object of a derived class. In code on a loop, and in threads
that asgiref starts from a loop, the new object keeps its attributes by context (see request.py). In
all other code the original object still keeps them, by thread.

Note [Why objects are replaced]
Three other ways were considered. To swap the dictionaries of threads at each switch of a greenlet
does not help the body of an async view or the threads of its request, which are not green; and each
switch would take time for all objects. Hooks for known packages do not help a project's own code.
To patch `threading.local` itself is too late for objects that modules have made before Django is
set up, and would change the standard library. A replaced object slows down only the code that uses
the object.

Note [Bound to a thread]
Some values work only in the thread that made them: connections of sqlite3, event loops. Such a
value stays with its thread: code in another thread finds the attribute missing, and makes its own
value, as it would in a new thread.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import logging
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from types import CellType, ModuleType
from typing import Any, TypeGuard

from . import request

logger = logging.getLogger("pgbackend")

_OF_THREADS_AND_LOOPS = (
    *("anyio", "asgiref", "concurrent", "curio", "eventlet", "gevent", "greenlet", "sniffio"),
    *("trio", "twisted", "uvloop"),
)
_SERVERS = ("daphne", "granian", "gunicorn", "h11", "httptools", "hypercorn", "uvicorn", "uwsgi")
_DRIVERS = ("asyncpg", "psycopg", "psycopg_binary", "psycopg_c", "psycopg_pool")
_TOOLS = ("_pytest", "coverage", "pluggy", "pydevd", "pytest")
#: Packages whose thread-locals stay as they are, beside the standard library's. Django's own follow
#: contexts already, except those that belong to a thread (handles of GEOS).
EXCLUDED = frozenset({"django", "pgbackend", *_OF_THREADS_AND_LOOPS, *_SERVERS, *_DRIVERS, *_TOOLS})

_THREAD_BOUND = (
    *(sqlite3.Connection, sqlite3.Cursor, asyncio.AbstractEventLoop, threading.Thread),
    type(threading.RLock()),
)
_MISSING = object()
_get = threading.local.__getattribute__
_set = threading.local.__setattr__
_delete = threading.local.__delattr__


@dataclass
class Converted:
    """The record of a `threading.local` that was replaced; it owns the values in request.py."""

    name: str
    """The dotted name by which it was found first."""
    original: threading.local
    """The object that keeps the attributes of sync code that no loop has started, by thread."""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """`args` and `kwargs` are passed to `__init__()`, which is called in each new context."""

    def values(self, owner: object) -> Mapping[str, Any]:
        """Return the attributes in this context; in a new context, let `__init__()` set them first.

        That is the `__init__()` of the original's class. It is called with `owner`, the object that
        replaces the original.
        """
        values = request.values_of(self)
        if values is None:
            values = {}
            initialise: Any = type(self.original).__init__
            if initialise is not object.__init__:
                request.change(self, values)  # or `__init__()`, which calls this, would run again
                initialise(owner, *self.args, **self.kwargs)
                values = request.values_of(self) or {}
        return values

    def of_thread(self) -> dict[str, Any]:
        """Return the attributes that the original object keeps for the running thread."""
        attributes: dict[str, Any] = _get(self.original, "__dict__")
        return attributes

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class Following(threading.local):
    """The base class of the replacements: it keeps attributes by context if `request.follows()`.

    In other code, the original object keeps them, by thread.
    """

    _converted: Converted

    def __getattribute__(self, name: str) -> Any:
        cls: Any = type(self)
        converted: Converted = cls._converted
        if not request.follows():
            return _get(converted.original, name)
        found = _of_class(cls, name)
        if hasattr(type(found), "__set__"):
            return _Attributes(self, converted) if name == "__dict__" else _plainly(self, name)
        values = converted.values(self)
        if name in values:
            return values[name]
        bound = converted.of_thread().get(name)
        if isinstance(bound, _THREAD_BOUND):
            return bound
        return _plainly(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        cls: Any = type(self)
        converted: Converted = cls._converted
        if not request.follows() or isinstance(value, _THREAD_BOUND):
            _set(converted.original, name, value)
            if request.follows() and name in converted.values(self):
                _without(self, converted, name)
        elif hasattr(type(found := _of_class(cls, name)), "__set__"):
            found.__set__(self, value)
        else:
            request.change(converted, {**converted.values(self), name: value})

    def __delattr__(self, name: str) -> None:
        cls: Any = type(self)
        converted: Converted = cls._converted
        if not request.follows():
            _delete(converted.original, name)
        elif name in converted.values(self):
            _without(self, converted, name)
        elif isinstance(converted.of_thread().get(name), _THREAD_BOUND):
            _delete(converted.original, name)
        elif hasattr(type(found := _of_class(cls, name)), "__delete__"):
            found.__delete__(self)
        else:
            _plainly(self, name)  # raises AttributeError, unless the class has the attribute
            raise AttributeError(name)


def _without(local: Following, converted: Converted, name: str) -> None:
    values = {**converted.values(local)}
    del values[name]
    request.change(converted, values)


#: Looks an attribute up as for ordinary objects, without the dictionary of a thread.
_plainly = object.__getattribute__


def _of_class(cls: type[Any], name: str) -> Any:
    for each in cls.__mro__:
        if name in each.__dict__:
            return each.__dict__[name]
    return None


class _Attributes(MutableMapping[str, Any]):
    """A mapping that stands for the `__dict__` of a replacement, in this context."""

    def __init__(self, local: Following, converted: Converted) -> None:
        self._local = local
        self._converted = converted

    def __getitem__(self, name: str) -> Any:
        return self._converted.values(self._local)[name]

    def __setitem__(self, name: str, value: object) -> None:
        request.change(self._converted, {**self._converted.values(self._local), name: value})

    def __delitem__(self, name: str) -> None:
        values = {**self._converted.values(self._local)}
        del values[name]
        request.change(self._converted, values)

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._converted.values(self._local)))

    def __len__(self) -> int:
        return len(self._converted.values(self._local))

    def __repr__(self) -> str:
        return repr(dict(self))


class _Lender(request.Lender):
    """A `request.Lender` of the attributes that the original objects keep for a thread."""

    def lend(self) -> request.Values:
        return {each: dict(values) for each in converted if (values := each.of_thread())}

    def take_back(self, values: request.Values) -> None:
        for each in converted:
            attributes = each.of_thread()
            kept = {n: v for n, v in attributes.items() if isinstance(v, _THREAD_BOUND)}
            attributes.clear()
            attributes.update({**values.get(each, {}), **kept})


# --- Finding and replacing ------------------------------------------------------------------------


#: The objects of this process that were replaced; and, by name, why others could not be.
converted: list[Converted] = []
refused: dict[str, str] = {}


@dataclass
class _Progress:
    """The record of the search for `threading.local` objects: its options, and modules seen.

    `exclude` and `include` are the arguments of `begin()`.
    """

    exclude: frozenset[str] = frozenset()
    include: frozenset[str] = frozenset()
    modules: int = 0
    """The number of modules that were loaded at the last search."""
    seen: set[str] = field(default_factory=set)


_progress = _Progress()


def begin(*, exclude: frozenset[str] = frozenset(), include: frozenset[str] = frozenset()) -> None:
    """Give each request its own values in the `threading.local` objects of all loaded modules.

    Objects that are excluded stay as they are. `exclude` and `include` are dotted names of objects
    (``package.module.name``), or of modules or packages; `include` overrides both `exclude` and
    `EXCLUDED`. `go_on()` converts the objects of modules that are loaded later.
    """
    _progress.exclude, _progress.include = exclude, include
    go_on()


def go_on() -> None:
    """Convert the thread-locals of modules that were loaded since the last call."""
    if len(sys.modules) != _progress.modules:
        look_at_new_modules()


def look_at_new_modules() -> None:
    """Convert the thread-locals of new modules, and of `__main__`, which may still be running."""
    _progress.modules = len(sys.modules)
    new = {name: each for name, each in list(sys.modules.items()) if name not in _progress.seen}
    _progress.seen.update(new)
    new["__main__"] = sys.modules["__main__"]
    _convert_those_of(new)


def _convert_those_of(modules: Mapping[str, Any]) -> None:
    exclude, include = _progress.exclude, _progress.include
    names: dict[int, str] = {}
    originals: list[threading.local] = []
    places: dict[int, list[Replace | str]] = {}
    for name, original, replace in _find(modules, exclude, include):
        if id(original) not in names:
            names[id(original)] = name
            originals.append(original)
        places.setdefault(id(original), []).append(replace)
    if originals:
        _add_other_places(originals, places)
    for original in originals:
        name = names[id(original)]
        why = _convert_one(name, original, places[id(original)])
        if why is not None:
            refused[name] = why
        else:
            logger.debug("pgbackend: the threading.local %s follows requests", name)
    if converted and not any(isinstance(each, _Lender) for each in request.lenders):
        request.lenders.append(_Lender())


#: A function that puts its argument in one place that refers to the original.
Replace = Callable[[Any], None]


def _find(
    modules: Mapping[str, Any], exclude: frozenset[str], include: frozenset[str]
) -> Iterator[tuple[str, threading.local, Replace]]:
    exclude |= EXCLUDED
    for name, module in modules.items():
        if not isinstance(module, ModuleType) or not _may_have_some(name, exclude, include):
            continue
        for found, local, replace in _of_module(name, module):
            if _is_named(found, include) or not _is_left_alone(found, exclude):
                yield found, local, replace


def _may_have_some(module: str, exclude: frozenset[str], include: frozenset[str]) -> bool:
    if not _is_left_alone(module, exclude):
        return True
    return any(each == module or each.startswith(f"{module}.") for each in include)


def _is_left_alone(name: str, exclude: frozenset[str]) -> bool:
    """Return whether `name` is excluded, or belongs to the standard library."""
    package = name.partition(".")[0]
    is_standard = package in sys.stdlib_module_names and package != "__main__"
    return is_standard or _is_named(name, exclude)


def _is_named(name: str, names: frozenset[str]) -> bool:
    """Return whether `names` has `name`, or a package, module or class that `name` is in."""
    return any(name == each or name.startswith(f"{each}.") for each in names)


def _of_module(name: str, module: ModuleType) -> Iterator[tuple[str, threading.local, Replace]]:
    for attribute, value in list(vars(module).items()):
        dotted = f"{name}.{attribute}"
        if _is_local(value):
            yield dotted, value, partial(setattr, module, attribute)
            continue
        cls = value if _is_class(value) else type(value)
        if not _is_left_alone(str(cls.__module__), EXCLUDED):
            for inner, each in _attributes_of(value):
                if _is_local(each):
                    set_plainly = setattr if _is_class(value) else object.__setattr__
                    yield f"{dotted}.{inner}", each, partial(set_plainly, value, inner)


def _attributes_of(value: object) -> list[tuple[str, Any]]:
    """Return the items in the dictionary of `value`, without evaluating lazy objects."""
    try:
        kept = type.__dict__["__dict__"].__get__(value) if _is_class(value) else None
        kept = object.__getattribute__(value, "__dict__") if kept is None else kept
    except AttributeError:
        return []
    return list(kept.items())


# These do not use `isinstance()`, which would evaluate lazy objects, and would believe objects that
# misstate their class.


def _is_class(value: object) -> TypeGuard[type]:
    return issubclass(type(value), type)


def _is_local(value: object) -> bool:
    return issubclass(type(value), threading.local) and not issubclass(type(value), Following)


def _add_other_places(
    originals: list[threading.local], places: dict[int, list[Replace | str]]
) -> None:
    """Add to `places` an entry for each reference to `originals` that the garbage collector finds.

    `places` has a list of entries for each original, by its `id()`. An entry is a function that
    puts a new object in the original's place; or, if the reference cannot be changed, a text that
    says why. The garbage collector does not find references from objects that `gc.freeze()` hides.
    """
    mark = object()  # identifies the tuple of this call's arguments, which is no place to replace
    for referrer in gc.get_referrers(*originals, mark):
        if referrer is originals or inspect.isframe(referrer):
            continue
        if type(referrer) is tuple and mark in referrer:
            continue
        for original in originals:
            if any(each is original for each in gc.get_referents(referrer)):
                places[id(original)].append(_place_in(referrer, original))


def _place_in(referrer: object, original: threading.local) -> Replace | str:
    if isinstance(referrer, dict):
        return _in_dict(referrer, original)
    if isinstance(referrer, list):
        return lambda new: _replace_in_list(referrer, original, new)
    if isinstance(referrer, CellType):
        return lambda new: setattr(referrer, "cell_contents", new)
    names = [name for name, value in _attributes_of(referrer) if value is original]
    names += [name for name in _slots_of(referrer) if getattr(referrer, name, None) is original]
    if not names or _is_class(referrer):
        return f"a {type(referrer).__name__} refers to it, which cannot be changed"

    def in_attributes(new: object) -> None:
        for name in names:
            object.__setattr__(referrer, name, new)

    return in_attributes


def _in_dict(referrer: dict[Any, Any], original: threading.local) -> Replace:
    owner = _class_of(referrer)
    keys = [key for key, value in referrer.items() if value is original]

    def in_dict(new: object) -> None:
        for key in keys:
            if owner is None:
                referrer[key] = new
            else:
                setattr(owner, key, new)

    return in_dict


def _replace_in_list(referrer: list[Any], original: threading.local, new: object) -> None:
    referrer[:] = [new if each is original else each for each in referrer]


def _slots_of(referrer: object) -> Iterator[str]:
    for cls in type(referrer).__mro__:
        for name, member in vars(cls).items():
            if inspect.ismemberdescriptor(member):
                yield name


def _class_of(namespace: dict[Any, Any]) -> type[Any] | None:
    """Return the class whose dictionary is `namespace`, or None."""
    if "__dict__" not in namespace and "__module__" not in namespace:
        return None
    classes = [each for each in gc.get_referrers(namespace) if inspect.isclass(each)]
    return next((each for each in classes if _is_namespace(each, namespace)), None)


def _is_namespace(cls: type[Any], namespace: dict[Any, Any]) -> bool:
    return any(each is namespace for each in gc.get_referents(cls))


def _convert_one(name: str, original: threading.local, places: list[Replace | str]) -> str | None:
    """Replace `original` in all `places`; return the reason if that cannot be done, else None."""
    cls: type[Any] = type(original)
    refusal = next((each for each in places if isinstance(each, str)), None)
    if refusal is not None:
        return refusal
    args, kwargs = _made_with(original)
    entry = Converted(name, original, args, kwargs)
    bases = (Following,) if cls is threading.local else (cls, Following)
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    try:
        metaclass: Any = type(cls)
        following = metaclass(cls.__name__, bases, {**namespace, "_converted": entry})
        new = threading.local.__new__(following)
    except TypeError as exc:
        return f"its class cannot be derived from: {exc}"
    converted.append(entry)
    for replace in places:
        replace(new)  # type: ignore[operator]  # `places` has no text: see `refusal`
    return None


def _made_with(original: threading.local) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that `original` was made with; `threading.local` keeps them."""
    kept = gc.get_referents(original)
    args = next((each for each in kept if type(each) is tuple), ())
    named = (each for each in kept if type(each) is dict and each)
    kwargs = next((each for each in named if all(type(key) is str for key in each)), {})
    return args, kwargs
