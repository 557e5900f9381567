"""Makes the objects of a query's rows by a function written for their model: the shortcut `rows`.

Django makes an object by `Model.from_db()` and `Model.__init__()`, which ask each field for its
name, and look for defaults and keyword arguments, which a row never needs: half of the instructions
of a query for a hundred rows (`benchmarks/cost.py --instructions`). If both methods are Django's
own, Django's `ModelIterable` gets a `RowConstructor` in the place of the model, when it reads the
models and their columns from a compiler (`klass_info`). Its `from_db()` makes the same object: its
code is generated for the fields of the model, as `dataclasses` generates an `__init__()`. All other
code that reads `klass_info` gets the model.

Note [Row constructors]
A model has no row constructor if it overrides `__init__`, `__new__`, `__setattr__` or `from_db`
(checked for each query, since tools patch these), or if its `pre_init` or `post_init` has a
receiver. The generated code sets attributes, so descriptors of fields are called; except the
descriptor of a foreign key's column, for which it writes to `__dict__`: that descriptor only drops
a cached related object, and a new object has none. Each query checks that the descriptor is still
there.
"""

from __future__ import annotations

import keyword
import sys
from collections.abc import Callable
from operator import attrgetter, is_
from types import MethodType
from typing import Any

from django.db.models import Model
from django.db.models import base as models_base
from django.db.models.fields.related_descriptors import ForeignKeyDeferredAttribute
from django.db.models.query import ModelIterable
from django.db.models.signals import post_init, pre_init

from pgbackend.compiler import CompiledStatement, SQLCompiler, put_before
from pgbackend.patches import NO_OTHERS, if_unpatched, unpatched

#: Returns the methods of a model class that make an object.
_making = attrgetter("__init__", "__new__", "__setattr__", "from_db.__func__")
_MAKING: Any = _making(Model)
if unpatched(Model.__init__, Model.from_db.__func__) is NO_OTHERS:  # type: ignore[attr-defined]
    _MAKING = NO_OTHERS

_SET_KEY = if_unpatched(ForeignKeyDeferredAttribute.__set__)
#: The code object of Django's method that makes objects from rows.
_ITERATING: Any = getattr(if_unpatched(ModelIterable.__iter__), "__code__", None)

#: Whether `ModelState.__del__()` clears `fields_cache`, which it would have to make first.
_STATE_CLEARS = hasattr(models_base.ModelState, "__del__")

_SOURCE = """\
def from_db(db, field_names, values, *, fetch_mode=None):
    if (
        len(values) != {count}
        or pre_init.receivers != constructor.pre_init
        or post_init.receivers != constructor.post_init
    ):
        return from_django(db, field_names, values, fetch_mode)
    new = make(model)
    new._state = state = ModelState()
    {targets}, = values
    state.adding = False
    state.db = db
    if fetch_mode is not None:
        state.fetch_mode = fetch_mode
    {and_more}
    return new
"""


class _KlassInfo:
    """The descriptor `klass_info`: `ModelIterable` sees row constructors, other code models."""

    def __get__(self, made_by: Any, cls: Any) -> Any:
        if made_by is None:
            return self
        found = made_by.__dict__["klass_info"]
        if (
            found is not None
            and sys._getframe(1).f_code is _ITERATING
            and type(made_by) is SQLCompiler
        ):
            return _with_constructors(found)
        return found

    def __set__(self, made_by: Any, value: Any) -> None:
        made_by.__dict__["klass_info"] = value


class MakesObjects(CompiledStatement):
    """A base of the SELECT compiler: row constructors make its objects.

    It does nothing for compilers of derived classes.
    """

    klass_info = _KlassInfo()


def _with_constructors(klass_info: Any) -> Any:
    changed = {**klass_info, "model": standing_for(klass_info["model"])}
    if related := klass_info.get("related_klass_infos"):
        changed["related_klass_infos"] = [*map(_with_constructors, related)]
    return changed


def standing_for(model: Any) -> Any:
    """Return the row constructor of `model`, or `model` itself if it cannot have one."""
    try:
        if type(model.from_db) is not MethodType or not all(map(is_, _making(model), _MAKING)):
            return model
    except AttributeError:  # `from_db` is no bound method
        return model
    opts = model._meta  # noqa: SLF001
    constructor: RowConstructor | None = opts.__dict__.get("_pgbackend_row_constructor")
    if (
        constructor is None
        or constructor.fields is not opts.concrete_fields
        or constructor.is_stale()
    ):
        if not _can_be_written(model, opts.concrete_fields):
            return model
        constructor = opts._pgbackend_row_constructor = RowConstructor(model, opts.concrete_fields)  # noqa: SLF001
    if pre_init.receivers != constructor.pre_init or post_init.receivers != constructor.post_init:
        # Copied before the check, because another thread may connect a receiver in between.
        listening = pre_init.receivers.copy(), post_init.receivers.copy()
        if pre_init.has_listeners(model) or post_init.has_listeners(model):
            return model
        constructor.pre_init, constructor.post_init = listening
    return constructor


class RowConstructor:
    """Stands in for a model in `ModelIterable`: `from_db()` is generated, the rest the model's."""

    __slots__ = ("descriptors", "fields", "from_db", "keys", "model", "post_init", "pre_init")

    def __init__(self, model: Any, fields: Any) -> None:
        self.model = model
        #: Django makes another list when the fields of the model change.
        self.fields = fields
        #: The receivers of both signals, when none of them was for this model.
        self.pre_init: list[Any] = []
        self.post_init: list[Any] = []
        #: The attributes of foreign keys' columns, and the model's descriptors of these names.
        self.keys: list[str] = []
        self.descriptors: list[Any] = []
        for field in fields:
            if _is_a_key(descriptor := vars(model).get(field.attname)):
                self.keys.append(field.attname)
                self.descriptors.append(descriptor)
        self.from_db = _write_from_db(self)

    def is_stale(self) -> bool:
        """Return whether a descriptor of a foreign key, or its `__set__()`, was replaced since."""
        return bool(self.keys) and (
            ForeignKeyDeferredAttribute.__set__ is not _SET_KEY
            or not all(map(is_, map(vars(self.model).get, self.keys), self.descriptors))
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _can_be_written(model: Any, fields: Any) -> bool:
    return (
        type(model).__call__ is type.__call__
        # `Model.__init__()` calls the next base's, if there is one besides `object`.
        and super(Model, model).__init__ is object.__init__
        and all(map(_is_a_name, [field.attname for field in fields]))
    )


def _is_a_name(attname: str) -> bool:
    # ASCII only, because Python's compiler normalizes other names.
    return attname.isascii() and attname.isidentifier() and not keyword.iskeyword(attname)


def _write_from_db(constructor: RowConstructor) -> Callable[..., Any]:
    """Generate the code of `from_db()` for the fields of a model, and return the function."""
    model: Any = constructor.model
    names = [field.attname for field in constructor.fields]
    source = _SOURCE.format(
        count=len(names),
        targets=", ".join([_target(constructor, name) for name in names]),
        and_more="state.fields_cache = {}" if _STATE_CLEARS else "",
    )

    def from_django(db: Any, field_names: Any, values: Any, fetch_mode: Any) -> Any:
        options = {} if fetch_mode is None else {"fetch_mode": fetch_mode}
        return model.from_db(db, field_names, values, **options)

    written: dict[str, Any] = {
        "ModelState": models_base.ModelState,
        "from_django": from_django,
        "make": object.__new__,
        "constructor": constructor,
        "model": model,
        "post_init": post_init,
        "pre_init": pre_init,
    }
    exec(compile(source, f"<from_db() of {model.__qualname__}>", "exec"), written)  # noqa: S102 - names are checked
    from_db: Any = written["from_db"]
    # So Django takes it for its own method, which accepts `fetch_mode`: this function does, too.
    from_db.__func__ = _MAKING[-1]
    return from_db  # type: ignore[no-any-return]  # written


def _is_a_key(descriptor: Any) -> bool:
    return type(descriptor) is ForeignKeyDeferredAttribute and type(descriptor).__set__ is _SET_KEY


def _target(constructor: RowConstructor, attname: str) -> str:
    """Return the code to which a field's value is assigned; see Note [Row constructors]."""
    return f"new.__dict__[{attname!r}]" if attname in constructor.keys else f"new.{attname}"


def install() -> None:
    """Put `MakesObjects` in front of the bases of the compiler of SELECTs."""
    put_before(SQLCompiler, MakesObjects)
