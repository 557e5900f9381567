"""Takes all settings of the order desk from the environment.

Nothing secret is written here: the key that signs sessions is made at each start unless
``SECRET_KEY`` brings one, and the database's password comes in with ``DATABASE_URL``.
"""

from os import environ
from pathlib import Path

from django.core.management.utils import get_random_secret_key

from pgbackend import embedded

BASE_DIR = Path(__file__).resolve().parent.parent


def _switch(name, default):
    """Read an on/off variable; only the usual spellings of "on" switch it on."""
    return environ.get(name, default).strip().lower() in {"1", "true", "yes", "on"}


# Signs cookies. All processes that serve one site must share one key, by ``SECRET_KEY``.
SECRET_KEY = environ.get("SECRET_KEY") or get_random_secret_key()
DEBUG = _switch("DEBUG", "0")
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]", *environ.get("ALLOWED_HOSTS", "").split()]
CSRF_TRUSTED_ORIGINS = environ.get("CSRF_TRUSTED_ORIGINS", "").split()

INSTALLED_APPS = [
    "kitchen",
    "pgbackend",  # its page in the admin
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]

MIDDLEWARE = [
    "kitchen.inflight.InFlightMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "proj.urls"
ASGI_APPLICATION = "proj.asgi.application"
WSGI_APPLICATION = "proj.wsgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

_database = embedded.database_settings(environ.get("DATABASE_URL", "postgresql:///kitchen"))
DATABASES = {
    "default": {
        **_database,
        "ENGINE": "pgbackend",
        "OPTIONS": {
            **_database.get("OPTIONS", {}),
            # Small on purpose: the status page shows how many requests these few connections serve.
            "pool": {"min_size": 1, "max_size": int(environ.get("POOL_SIZE", "4"))},
        },
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "kitchen:board"
LOGOUT_REDIRECT_URL = "kitchen:board"

LANGUAGE_CODE = "en"
TIME_ZONE = environ.get("TIME_ZONE", "UTC")
USE_I18N = True
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = BASE_DIR / "var" / "static"

# The kitchen's estimate: how long the service takes to answer, how long an order waits for it,
# and its URL. Without a URL the server asks itself, at the address of the incoming request.
KITCHEN_SERVICE_SECONDS = float(environ.get("KITCHEN_SERVICE_SECONDS", "0.5"))
KITCHEN_SERVICE_TIMEOUT = float(environ.get("KITCHEN_SERVICE_TIMEOUT", "10"))
KITCHEN_SERVICE_URL = environ.get("KITCHEN_SERVICE_URL", "")

# How often the status page is told its numbers. The pictures of docs/demo.md are made with more.
KITCHEN_STATUS_SECONDS = float(environ.get("KITCHEN_STATUS_SECONDS", "0.25"))

# A rush may be started from the status page by staff, or (in the demo) by anyone who can reach it.
KITCHEN_RUSH_OPEN = _switch("KITCHEN_RUSH_OPEN", "0")
