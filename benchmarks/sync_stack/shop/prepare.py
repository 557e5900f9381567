"""Makes the tables and rows, and prints what a client needs to be let in: a JSON object."""

import json
import random
from datetime import date, timedelta

import django
from django.core.management import call_command

AUTHORS, BOOKS = 200, 2000


def main() -> None:
    django.setup()
    from django.conf import settings
    from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
    from django.contrib.auth.models import User
    from django.contrib.sessions.backends.db import SessionStore
    from rest_framework.authtoken.models import Token

    from .models import Author, Book

    call_command("migrate", run_syncdb=True, verbosity=0)
    draw = random.Random(7)  # noqa: S311 - rows of a benchmark
    authors = Author.objects.bulk_create(Author(name=f"author {n}") for n in range(AUTHORS))
    Book.objects.bulk_create(
        Book(
            title=f"book {n}",
            author=draw.choice(authors),
            price=draw.randrange(100, 10_000) / 100,
            published=date(2000, 1, 1) + timedelta(days=n),
        )
        for n in range(BOOKS)
    )
    user = User.objects.create_superuser("admin", password="admin")  # noqa: S106
    session = SessionStore()
    session[SESSION_KEY] = str(user.pk)
    session[BACKEND_SESSION_KEY] = "django.contrib.auth.backends.ModelBackend"
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.create()
    told = {
        "cookie": f"{settings.SESSION_COOKIE_NAME}={session.session_key}",
        "token": Token.objects.create(user=user).key,
        "books": BOOKS,
        "authors": AUTHORS,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
