"""Maps the site's addresses: the order desk at the root; the admin, sign-in, health beside it."""

from django.contrib import admin
from django.contrib.auth import views as auth
from django.templatetags.static import static
from django.urls import include, path
from django.views.generic import RedirectView

urlpatterns = [
    path("", include("kitchen.urls")),
    path("sign-in/", auth.LoginView.as_view(redirect_authenticated_user=True), name="login"),
    path("sign-out/", auth.LogoutView.as_view(), name="logout"),
    path("admin/", admin.site.urls),
    path("health/", include("pgbackend.health")),
    # Browsers ask for it on pages that name no icon, as those of health.
    path("favicon.ico", RedirectView.as_view(url=static("kitchen/quince.svg"))),
]
