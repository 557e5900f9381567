from django.apps import AppConfig

from pgbackend.apps import PgbackendConfig


class LibraryConfig(AppConfig):
    name = "tests.library"
    label = "library"
    default_auto_field = "django.db.models.BigAutoField"


class PageOnly(AppConfig):
    """The app of pgbackend with its page in the admin, and without its `ready()`."""

    name = "pgbackend"
    verbose_name = PgbackendConfig.verbose_name
    default_auto_field = PgbackendConfig.default_auto_field
