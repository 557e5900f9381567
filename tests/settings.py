"""Configures the tests: the order desk's settings, with a small library of models beside them."""

from tests import server  # noqa: F401 - sets DATABASE_URL, which the next import reads

# isort: split

from proj.settings import *  # noqa: F403
from proj.settings import DATABASES, INSTALLED_APPS, MIDDLEWARE

# ENGINE alone must do: so the app is here for its page only, and installs nothing early.
INSTALLED_APPS = [*INSTALLED_APPS, "tests.library", "tests.docs.shop"]
INSTALLED_APPS[INSTALLED_APPS.index("pgbackend")] = "tests.library.apps.PageOnly"
MIDDLEWARE = [*MIDDLEWARE, "tests.library.middleware.async_middleware"]
ROOT_URLCONF = "tests.urls"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
SECRET_KEY = "tests"
DATABASES["default"]["OPTIONS"]["pool"] = {"min_size": 0, "max_size": 4, "timeout": 5}
# The socket has a thread, which tests would find left over; tests/operating opens its own.
PGBACKEND_CONTROL_DIR = False
