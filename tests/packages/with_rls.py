"""Uses django-rls: the user of row-level security is a setting of the session, `set_config()`."""

from contextlib import nullcontext

from tests.packages.project import STOCK, execute, green, setup

project = setup(
    __name__,
    "django-rls",
    state="`set_config()` for the session, `ContextVar`",
    apps=["django_rls"],
    middleware=["django_rls.middleware.RLSContextMiddleware"],
    line="async code that uses the database: `async with pgbackend.pinned():`, and in it the "
    "package's `rls_context(user_id=...)`. Without, it sees no rows: the session in which sync "
    "middleware has set the user is that of its thread",
)

from django.db import connection, models  # noqa: E402
from django.db.models.expressions import RawSQL  # noqa: E402
from django_rls.context import rls_context  # noqa: E402

#: The condition of a policy on the user. (Policies do not apply to superusers, as in tests.)
USER = "NULLIF(current_setting('rls.user_id', true), '')::int"


class Note(models.Model):
    owner = models.CharField(max_length=100)
    user = models.ForeignKey("auth.User", models.CASCADE)


def pinned():
    if STOCK:
        return nullcontext()
    import pgbackend

    return pgbackend.pinned()


def user_of_session():
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT username FROM auth_user WHERE id = {USER}")
        row = cursor.fetchone()
    return row[0] if row else None


def work(request, who, number):
    """Run in the request's thread, where middleware has set the user."""
    Note.objects.create(owner=who, user=request.user)
    owners = {
        *Note.objects.filter(user=RawSQL(USER, ())).values_list("owner", flat=True).distinct()
    }
    return who if owners == {user_of_session()} == {who} else f"{owners}"


def work_with_context(request, who, number):
    with rls_context(user_id=request.user.pk):
        return work(request, who, number)


async def awork(request, who, number):
    assert await green(user_of_session) in {None, who}
    async with pinned():
        return await green(work_with_context, request, who, number)


def wrong_rows():
    execute("TRUNCATE with_rls_note")
    return []
