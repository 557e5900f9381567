"""Serves the order desk on the cluster, with keys that make a repeated order harmless."""

from proj.settings_cluster import *  # noqa: F403
from proj.settings_cluster import INSTALLED_APPS, MIDDLEWARE

INSTALLED_APPS = [*INSTALLED_APPS, "tests.scaleout.keys", "tests.library"]
MIDDLEWARE = [*MIDDLEWARE, "tests.scaleout.keys.middleware.KeyMiddleware"]
ROOT_URLCONF = "tests.scaleout.keys.urls"
# The kitchen's estimate is made within the transaction of the key: it must not take long.
KITCHEN_SERVICE_SECONDS = 0.0
# The errors behind the answers with status 500 are in the log of each desk.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(asctime)s.%(msecs)03d %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"handlers": ["console"]},
}
