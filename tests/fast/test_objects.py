"""Tests that objects are made of rows as Django makes them, and by Django if that could differ."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import django
import pytest
from django.apps.registry import Apps
from django.contrib.contenttypes.fields import GenericForeignKey
from django.contrib.contenttypes.models import ContentType
from django.db import models, transaction
from django.db.models import Model
from django.db.models.fields.related_descriptors import ForeignKeyDeferredAttribute
from django.db.models.signals import post_init, pre_init
from django.dispatch import Signal

from kitchen.models import Dish, Order, OrderLine, Section
from pgbackend.fast import rows as objects
from pgbackend.patches import NO_OTHERS
from tests.conftest import Runner
from tests.library.models import Author, Book

HAS_FETCH_MODES = django.VERSION >= (6, 1)


def a_model(*bases: type[Any], meta: Any = (), kind: Any = None, **attributes: Any) -> Any:
    """Make a new model, which nothing else refers to."""
    options = type("Meta", (), {"app_label": "library", "apps": Apps(), **dict(meta)})
    bases = bases or (Model,)
    kind = kind or type(bases[0])
    return kind("Made", bases, {"__module__": __name__, "Meta": options, **attributes})


def is_stood_for(model: Any) -> bool:
    return objects.standing_for(model) is not model


def told(obj: Any) -> Any:
    """Return everything that an object holds, in its order, except for lazily made state."""
    if obj is None:
        return None
    state = vars(obj._state)
    cached = {
        name: [told(other) for other in value] if isinstance(value, list) else told(value)
        for name, value in obj._state.fields_cache.items()
    }
    rest = {name: value for name, value in state.items() if name != "fields_cache"}
    values = [
        (name, value)
        for name, value in vars(obj).items()
        if not name.startswith(("_state", "_prefetched"))
    ]
    prefetched = getattr(obj, "_prefetched_objects_cache", {})
    many = {name: list(found) for name, found in prefetched.items()}
    return type(obj), list(vars(obj)), values, many, type(obj._state), rest, cached


def made_by_both(model: Any, values: tuple[Any, ...], **options: Any) -> tuple[Any, Any]:
    names = [field.attname for field in model._meta.concrete_fields]
    constructor = objects.standing_for(model)
    return tuple(each.from_db("default", names, values, **options) for each in (constructor, model))  # type: ignore[return-value]


class Loud:
    """Changes a value as it is set."""

    def __init__(self, field: Any) -> None:
        self.field = field

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else instance.__dict__[self.field.attname]

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.field.attname] = f"{value}!"


class LoudField(models.CharField):
    descriptor_class = Loud


class CarefulKey(ForeignKeyDeferredAttribute):
    def __set__(self, instance: Any, value: Any) -> None:
        super().__set__(instance, value and value * 10)


class CarefulForeignKey(models.ForeignKey):
    descriptor_class = CarefulKey


class Parent(models.Model):
    name = models.CharField(max_length=10)

    class Meta:
        app_label = "library"
        apps = Apps()

    def __str__(self) -> str:
        return self.name


def generic() -> Any:
    return a_model(
        kind_of=models.ForeignKey(ContentType, models.CASCADE),
        number=models.IntegerField(),
        other=GenericForeignKey("kind_of", "number"),
    )


STOOD_FOR: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "a key only": (a_model, (1,)),
    "values": (lambda: a_model(a=models.IntegerField(), b=models.TextField()), (1, 2, "b")),
    "a foreign key": (lambda: a_model(to=models.ForeignKey(Parent, models.CASCADE)), (1, 7)),
    "no foreign key": (
        lambda: a_model(to=models.ForeignKey(Parent, models.CASCADE, null=True)),
        (1, None),
    ),
    "a foreign key with a descriptor": (
        lambda: a_model(to=CarefulForeignKey(Parent, models.CASCADE)),
        (1, 7),
    ),
    "one to one": (lambda: a_model(to=models.OneToOneField(Parent, models.CASCADE)), (1, 7)),
    "of a parent": (lambda: a_model(Parent, more=models.TextField()), (1, "name", 1, "more")),
    "a proxy": (lambda: a_model(Parent, meta={"proxy": True}), (1, "name")),
    "a descriptor": (lambda: a_model(loud=LoudField(max_length=3)), (1, "a")),
    "a file": (lambda: a_model(file=models.FileField()), (1, "a/b")),
    "json": (lambda: a_model(json=models.JSONField()), (1, {"a": [1]})),
    "generic": (generic, (1, 2, 3)),
    "a method": (lambda: a_model(a=models.IntegerField(), twice=lambda self: self.a * 2), (1, 2)),
    "a private name": (lambda: a_model(_a=models.IntegerField()), (1, 2)),
}


@pytest.mark.parametrize("name", STOOD_FOR)
def test_an_object_is_what_django_makes(name: str) -> None:
    make, values = STOOD_FOR[name]
    model = make()
    assert is_stood_for(model)
    for _ in range(3):
        ours, djangos = made_by_both(model, values)
        assert told(ours) == told(djangos)
        assert ours == djangos
        if HAS_FETCH_MODES:  # otherwise `__del__()` would make it
            assert vars(ours._state)["fields_cache"] is not vars(djangos._state)["fields_cache"]


@pytest.mark.skipif(not HAS_FETCH_MODES, reason="Django 6.1 has fetch modes")
def test_an_object_has_the_fetch_mode_of_its_query() -> None:
    model = a_model(a=models.IntegerField())
    ours, djangos = made_by_both(model, (1, 2), fetch_mode=models.FETCH_PEERS)
    assert ours._state.fetch_mode is djangos._state.fetch_mode is models.FETCH_PEERS
    assert told(ours) == told(djangos)


def test_a_row_with_fewer_columns_is_given_to_django() -> None:
    model = a_model(a=models.IntegerField(), b=models.IntegerField())
    constructor = objects.standing_for(model)
    ours, djangos = (each.from_db("other", ["id", "b"], (1, 3)) for each in (constructor, model))
    assert told(ours) == told(djangos)
    assert ours.get_deferred_fields() == {"a"}


class WithInit:
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen = args


class Meddling(type(Model)):  # type: ignore[misc]  # a metaclass
    def __call__(cls, *args: Any) -> Any:
        made = super().__call__(*args)
        made.seen = args
        return made


def new(cls: Any, *args: Any) -> Any:
    made = object.__new__(cls)
    made.seen = args
    return made


def set_loudly(self: Any, name: str, value: Any) -> None:
    object.__setattr__(self, name, f"{value}!" if name.endswith("_id") else value)


@classmethod  # type: ignore[misc]  # of the class that it is put in
def from_db(cls: Any, db: Any, field_names: Any, values: Any, **options: Any) -> Any:
    made = super(cls, cls).from_db(db, field_names, values, **options)
    made.seen = tuple(values)
    return made


@staticmethod  # type: ignore[misc]
def from_db_of_no_class(db: Any, field_names: Any, values: Any, **options: Any) -> Any:
    made = mock.Mock(spec=[])
    made.seen = tuple(values)
    return made


def keyed(**attributes: Any) -> Any:
    return a_model(to=models.ForeignKey(Parent, models.CASCADE), **attributes)


LEFT_ALONE: dict[str, Callable[[], Any]] = {
    "__init__": lambda: keyed(__init__=lambda self, *args: super(type(self), self).__init__(*args)),
    "__init__ of a base": lambda: a_model(
        a_model(WithInit, Model, meta={"abstract": True}, kind=type(Model))
    ),
    "__init__ after Model": lambda: a_model(Model, WithInit),
    "__new__": lambda: keyed(__new__=new),
    "__setattr__": lambda: keyed(__setattr__=set_loudly),
    "from_db": lambda: keyed(from_db=from_db),
    "from_db of no class": lambda: keyed(from_db=from_db_of_no_class),
    "a metaclass": lambda: a_model(kind=Meddling),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_model_with_a_say_in_how_it_is_made_is_left_alone(name: str) -> None:
    assert not is_stood_for(LEFT_ALONE[name]())


@pytest.mark.parametrize("attname", ["no name", "class", "\N{LATIN SMALL LIGATURE FI}"])
def test_a_field_that_cannot_be_written_down_is_set_by_django(attname: str) -> None:
    model = a_model(**{attname: models.IntegerField()})
    assert not is_stood_for(model)
    ours, djangos = made_by_both(model, (1, 2))
    assert told(ours) == told(djangos)


PATCHES: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "Model.__init__": lambda model: mock.patch.object(Model, "__init__", autospec=True),
    "__init__": lambda model: mock.patch.object(model, "__init__"),
    "__new__": lambda model: mock.patch.object(model, "__new__", new),
    "__setattr__": lambda model: mock.patch.object(model, "__setattr__", set_loudly),
    "Model.from_db": lambda model: mock.patch.object(Model, "from_db", from_db),
    "from_db": lambda model: mock.patch.object(model, "from_db"),
    "from_db of no class": lambda model: mock.patch.object(model, "from_db", from_db_of_no_class),
}


@pytest.mark.parametrize("name", PATCHES)
def test_what_is_patched_is_asked_for_as_long_as_it_is(name: str) -> None:
    model = keyed()
    assert is_stood_for(model)
    with PATCHES[name](model):
        assert not is_stood_for(model)
    assert is_stood_for(model)


def test_what_was_patched_before_is_asked_for_always() -> None:
    """A tool may have patched before Django's settings are read."""
    with mock.patch.object(objects, "_MAKING", NO_OTHERS):
        assert not is_stood_for(keyed())


def test_a_descriptor_of_keys_that_is_patched_is_asked() -> None:
    def set_loudly(self: Any, instance: Any, value: Any) -> None:
        instance.__dict__[self.field.attname] = f"{value}!"

    with mock.patch.object(ForeignKeyDeferredAttribute, "__set__", set_loudly):
        ours, djangos = made_by_both(keyed(), (1, 7))
    assert told(ours) == told(djangos)
    assert ours.to_id == "7!"


def test_fields_that_come_later_are_set() -> None:
    model = a_model(a=models.IntegerField())
    before = objects.standing_for(model)
    models.IntegerField(default=5).contribute_to_class(model, "b")
    assert objects.standing_for(model) not in (before, model)
    ours, djangos = made_by_both(model, (1, 2, 3))
    assert told(ours) == told(djangos)
    assert ours.b == 3


def test_a_child_of_a_model_is_not_made_by_its_parents_constructor() -> None:
    class Child(Parent):
        class Meta:
            app_label = "library"
            apps = Apps()
            proxy = True

    for model in (Parent, Child, Parent):
        assert [type(each) for each in made_by_both(model, (1, "x"))] == [model, model]


def test_all_else_is_the_models() -> None:
    constructor = objects.standing_for(Author)
    assert constructor._meta is Author._meta
    assert constructor.objects.model is Author
    with pytest.raises(AttributeError, match="Author"):
        _ = constructor.nothing


def test_a_model_that_nobody_needs_is_forgotten() -> None:
    model = a_model()
    made = weakref.ref(objects.standing_for(model).from_db("default", ["id"], (1,)).__class__)
    del model
    gc.collect()
    assert made() is None


# --- Signals --------------------------------------------------------------------------------------


@pytest.fixture(params=[pre_init, post_init], ids=["pre_init", "post_init"])
def signal(request: pytest.FixtureRequest) -> Signal:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def heard(signal: Signal) -> Iterator[list[Any]]:
    """Record the key in each signal, from when the test connects the receiver."""
    said: list[Any] = []

    def hear(sender: Any, **kwargs: Any) -> None:
        said.append(kwargs["args"][0] if "args" in kwargs else kwargs["instance"].pk)

    said_by: Any = hear
    listening[id(said)] = said_by
    yield said
    signal.disconnect(said_by, sender=Author)
    signal.disconnect(said_by, sender=Book)
    del listening[id(said)]


listening: dict[int, Any] = {}


def test_who_listens_to_a_model_hears_of_each_object(signal: Signal, heard: list[Any]) -> None:
    keys = [Author.objects.create(name=name).pk for name in "abc"]
    assert [author.pk for author in Author.objects.order_by("pk")] == keys
    signal.connect(listening[id(heard)], sender=Author)
    assert [author.pk for author in Author.objects.order_by("pk")] == keys
    assert heard == keys
    signal.disconnect(listening[id(heard)], sender=Author)
    assert [author.pk for author in Author.objects.order_by("pk")] == keys
    assert heard == keys


def test_who_begins_to_listen_in_between_hears_of_the_next(
    signal: Signal, heard: list[Any]
) -> None:
    keys = [Author.objects.create(name=name).pk for name in "abc"]
    found = Author.objects.order_by("pk").iterator(chunk_size=10)
    assert next(found).pk == keys[0]
    signal.connect(listening[id(heard)], sender=Author)
    assert [author.pk for author in found] == heard == keys[1:]


def test_who_listens_to_another_model_hears_nothing(signal: Signal, heard: list[Any]) -> None:
    Author.objects.create(name="a")
    signal.connect(listening[id(heard)], sender=Book)
    assert is_stood_for(Author)
    assert not is_stood_for(Book)
    constructor = objects.standing_for(Author)
    assert (constructor.pre_init, constructor.post_init) == (
        pre_init.receivers,
        post_init.receivers,
    )
    assert Author.objects.get().name == "a"
    assert not heard


def test_who_listens_to_all_models_hears_of_each(signal: Signal) -> None:
    key = Author.objects.create(name="a").pk
    said: list[Any] = []

    def hear(sender: Any, **kwargs: Any) -> None:
        said.append(sender)

    signal.connect(hear)
    try:
        assert Author.objects.get().pk == key
    finally:
        signal.disconnect(hear)
    assert said == [Author]


# --- Queries --------------------------------------------------------------------------------------

QUERIES: dict[str, Callable[[], Any]] = {
    "all": Dish.objects.all,
    "get": lambda: Dish.objects.filter(pk=Dish.objects.first().pk),  # type: ignore[union-attr]
    "only": lambda: Dish.objects.only("name"),
    "related": lambda: Dish.objects.select_related("section"),
    "related, only": lambda: Dish.objects.select_related("section").only("name", "section__name"),
    "related, of related": lambda: OrderLine.objects.select_related("order", "dish__section"),
    "prefetched": lambda: Section.objects.prefetch_related("dishes"),
    "known": lambda: Section.objects.get(name="Soups").dishes.order_by("pk"),
    "annotated": lambda: Dish.objects.annotate(more=models.F("price") + 1),
    "extra": lambda: Dish.objects.extra(select={"one": "1"}),
    "distinct": lambda: Section.objects.filter(dishes__price__gt=0).distinct(),
    "union": lambda: Author.objects.filter(pk=1).union(Author.objects.all()).order_by("pk"),
    "raw": lambda: Dish.objects.raw("SELECT * FROM kitchen_dish ORDER BY id"),
    "in bulk": lambda: Dish.objects.in_bulk().values(),
    "earliest": lambda: [Order.objects.earliest("pk")],
    "iterator": lambda: Dish.objects.iterator(chunk_size=1),
    "values": lambda: Dish.objects.values("name"),
}


@pytest.fixture
def menu() -> None:
    for name in ("Soups", "Sweets"):
        section = Section.objects.create(name=name)
        dishes = [
            Dish.objects.create(section=section, name=f"{name} {price}", price=price)
            for price in (1, 2)
        ]
        order = Order.objects.create(table=name)
        OrderLine.objects.create(order=order, dish=dishes[0], quantity=1, price=1)
        Author.objects.create(name=name)


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_has_the_objects_of_djangos(
    name: str, menu: None, run_once: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> Any:
        return [each if isinstance(each, dict) else told(each) for each in QUERIES[name]()]

    ours = [found(), run_once.green(found)]
    copies = [pickle.loads(pickle.dumps(each)) for each in QUERIES[name]()]
    monkeypatch.setattr(objects, "standing_for", lambda model: model)
    djangos = found()
    assert djangos
    assert ours == [djangos, djangos]
    assert copies == list(QUERIES[name]())


def test_related_objects_are_made_so_too() -> None:
    made = OrderLine.objects.select_related("dish__section").query.get_compiler("default")
    made.as_sql()
    assert made.klass_info["model"] is OrderLine  # all but Django's ModelIterable see the model
    lines: Any = objects._with_constructors(made.klass_info)
    (dishes,) = lines["related_klass_infos"]
    (sections,) = dishes["related_klass_infos"]
    constructors = [each["model"] for each in (lines, dishes, sections)]
    assert [(type(each), each.model) for each in constructors] == [
        (objects.RowConstructor, model) for model in (OrderLine, Dish, Section)
    ]


def test_a_row_that_is_locked_is_found(menu: None) -> None:
    with transaction.atomic():
        locked = Dish.objects.select_related("section").select_for_update(of=("self", "section"))
        assert len(locked) == 4
