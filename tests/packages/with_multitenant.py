"""Uses django-multitenant: the tenant is in a `threading.local`, and filters each query."""

from tests.packages.project import LAST, WHO, another, execute, setup

project = setup(
    __name__,
    "django-multitenant",
    state="`threading.local`",
    apps=["django_multitenant"],
    middleware=[f"{__name__}.choose_tenant"],
)

from django.db import models  # noqa: E402
from django_multitenant.fields import TenantForeignKey  # noqa: E402
from django_multitenant.mixins import TenantManagerMixin, TenantModelMixin  # noqa: E402
from django_multitenant.utils import (  # noqa: E402
    get_current_tenant,
    set_current_tenant,
    unset_current_tenant,
)


class Shop(TenantModelMixin, models.Model):
    name = models.CharField(max_length=100)

    class TenantMeta:
        tenant_field_name = "id"


class Notes(TenantManagerMixin, models.Manager):
    pass


class Note(TenantModelMixin, models.Model):
    shop = TenantForeignKey(Shop, models.CASCADE)
    owner = models.CharField(max_length=100)
    objects = Notes()

    class TenantMeta:
        tenant_field_name = "shop_id"


def owners():
    return Note.objects.values_list("owner", flat=True).distinct()


def create_rows():
    for who in WHO:
        Shop.objects.create(name=who)


def shop_of(who):
    return Shop(pk=WHO.index(who) + 1, name=who)


def choose_tenant(get_response):
    """Choose the tenant as the package's documentation shows."""

    def middleware(request):
        set_current_tenant(shop_of(request.user.username))
        try:
            return get_response(request)
        finally:
            unset_current_tenant()

    return middleware


def said(who, seen):
    return who if set(seen) == {who} else f"{get_current_tenant()}: {seen}"


def work(request, who, number):
    if number == LAST:
        set_current_tenant(shop_of(another(who)))
        Note.objects.create(owner=another(who))
        set_current_tenant(shop_of(who))
    Note.objects.create(owner=who)
    return said(who, list(owners()))


async def awork(request, who, number):
    if number == LAST:
        set_current_tenant(shop_of(another(who)))
        await Shop.objects.acount()
        await Note.objects.acreate(owner=another(who))
        set_current_tenant(shop_of(who))
    await Shop.objects.acount()  # other requests run meanwhile
    await Note.objects.acreate(owner=who)
    return said(who, [owner async for owner in owners()])


def wrong_rows():
    found = execute(
        "SELECT owner, name FROM with_multitenant_note "
        "LEFT JOIN with_multitenant_shop AS shop ON shop.id = shop_id "
        "WHERE name IS DISTINCT FROM owner"
    )
    execute("TRUNCATE with_multitenant_note")
    return [f"a note of {owner} in the shop of {name}" for owner, name in found]
