import os

from pgbackend import embedded

SECRET_KEY = "shop"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
DEBUG = os.environ.get("SHOP_DEBUG") == "1"
ROOT_URLCONF = "shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "shop",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
STATIC_URL = "static/"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DATABASES = {
    "default": {
        **embedded.database_settings(os.environ["DATABASE_URL"]),
        "ENGINE": "pgbackend",
        # Each run of these tests has a database of its own.
        "TEST": {"NAME": os.environ.get("SHOP_DATABASE", "shop")},
    }
}
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]

match os.environ.get("SHOP_TOOL"):
    case "toolbar":
        INSTALLED_APPS += ["debug_toolbar"]
        MIDDLEWARE.insert(0, "debug_toolbar.middleware.DebugToolbarMiddleware")
        INTERNAL_IPS = ["127.0.0.1"]
        DEBUG = True
    case "silk":
        INSTALLED_APPS += ["silk"]
        MIDDLEWARE.insert(0, "silk.middleware.SilkyMiddleware")
