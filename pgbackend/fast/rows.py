"""Makes the objects of a query's rows by a function written for their model: the shortcut `rows`.

Django makes an object by `Model.from_db()` and `Model.__init__()`, which ask each field for its
name, and look for defaults and keywords that a row never leaves to them: half of the instructions
of a query for a hundred rows (`benchmarks/cost.py --instructions`). So where both are Django's own,
a `RowConstructor` stands in for the model where Django's `ModelIterable` asks a compiler for models
and their columns (`klass_info`). Its `from_db()` does the same, written out for the fields of the
model, as `dataclasses` writes an `__init__()`. All other code that reads `klass_info` finds the
model.

Note [Row constructors]
A model is left alone if it has an `__init__`, a `__new__`, a `__setattr__` or a `from_db` of its
own (asked for each query, since tools patch them), or if somebody listens to its `pre_init` or
`post_init`. Attributes are set, so fields with descriptors have their say; but for the key of a
foreign object: its descriptor only forgets an object that is cached for another key, and a new
object has none. Whether the model still has this descriptor is asked for each query.
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

#: The methods that make an object, as a class has them.
_making = attrgetter("__init__", "__new__", "__setattr__", "from_db.__func__")
_MAKING: Any = _making(Model)
if unpatched(Model.__init__, Model.from_db.__func__) is NO_OTHERS:  # type: ignore[attr-defined]
    _MAKING = NO_OTHERS

_SET_KEY = if_unpatched(ForeignKeyDeferredAttribute.__set__)
#: The code that makes objects of rows, whoever calls it.
_ITERATING: Any = getattr(if_unpatched(ModelIterable.__iter__), "__code__", None)

#: Whether the state of an object that ends clears what it has cached, and makes it for that.
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
    """Shows `klass_info` to Django's `ModelIterable` with row constructors instead of models."""

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
    """A compiler whose rows are made by row constructors, unless somebody has derived from it."""

    klass_info = _KlassInfo()


def _with_constructors(klass_info: Any) -> Any:
    changed = {**klass_info, "model": standing_for(klass_info["model"])}
    if related := klass_info.get("related_klass_infos"):
        changed["related_klass_infos"] = [*map(_with_constructors, related)]
    return changed


def standing_for(model: Any) -> Any:
    """Return the row constructor of `model`, or `model` where Django would make anything else."""
    try:
        if type(model.from_db) is not MethodType or not all(map(is_, _making(model), _MAKING)):
            return model
    except AttributeError:  # `from_db` is no method
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
        # Before they are asked: another thread's may come in between.
        listening = pre_init.receivers.copy(), post_init.receivers.copy()
        if pre_init.has_listeners(model) or post_init.has_listeners(model):
            return model
        constructor.pre_init, constructor.post_init = listening
    return constructor


class RowConstructor:
    """Stands for a model where objects are made of rows; all else is the model's."""

    __slots__ = ("descriptors", "fields", "from_db", "keys", "model", "post_init", "pre_init")

    def __init__(self, model: Any, fields: Any) -> None:
        self.model = model
        #: Django makes another list when the fields of the model change.
        self.fields = fields
        #: The receivers of other models, at a time when this model had none.
        self.pre_init: list[Any] = []
        self.post_init: list[Any] = []
        #: The attributes that are keys of foreign objects, and what the model has by these names.
        self.keys: list[str] = []
        self.descriptors: list[Any] = []
        for field in fields:
            if _is_a_key(descriptor := vars(model).get(field.attname)):
                self.keys.append(field.attname)
                self.descriptors.append(descriptor)
        self.from_db = _write_from_db(self)

    def is_stale(self) -> bool:
        """Return whether somebody has replaced a descriptor, or its class's method."""
        return bool(self.keys) and (
            ForeignKeyDeferredAttribute.__set__ is not _SET_KEY
            or not all(map(is_, map(vars(self.model).get, self.keys), self.descriptors))
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _can_be_written(model: Any, fields: Any) -> bool:
    return (
        type(model).__call__ is type.__call__
        # What comes after `Model` among its bases, and is called by that.
        and super(Model, model).__init__ is object.__init__
        and all(map(_is_a_name, [field.attname for field in fields]))
    )


def _is_a_name(attname: str) -> bool:
    # Of others, the compiler may make another name.
    return attname.isascii() and attname.isidentifier() and not keyword.iskeyword(attname)


def _write_from_db(constructor: RowConstructor) -> Callable[..., Any]:
    """Write `from_db()` for the fields of a model."""
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
    # Django looks whether it is its own, which takes `fetch_mode`: as this one does.
    from_db.__func__ = _MAKING[-1]
    return from_db  # type: ignore[no-any-return]  # written


def _is_a_key(descriptor: Any) -> bool:
    return type(descriptor) is ForeignKeyDeferredAttribute and type(descriptor).__set__ is _SET_KEY


def _target(constructor: RowConstructor, attname: str) -> str:
    """Return what the value of a field is assigned to; see Note [Row constructors]."""
    return f"new.__dict__[{attname!r}]" if attname in constructor.keys else f"new.{attname}"


def install() -> None:
    """Let the compiler of SELECTs say that row constructors are the models of its rows."""
    put_before(SQLCompiler, MakesObjects)
