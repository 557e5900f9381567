from django.conf import settings
from django.urls import include, path

from . import views

urlpatterns = [
    path("products/", views.products),
    path("products/sync/", views.products_sync),
    path("sell/<name>/", views.sell),
    path("account/", views.account),
    path("page/", views.page),
    path("page/sync/", views.page_sync),
    path("add/<name>/", views.add),
    path("add/sync/<name>/", views.add_sync),
]
if "debug_toolbar" in settings.INSTALLED_APPS:
    urlpatterns.append(path("__debug__/", include("debug_toolbar.urls")))
