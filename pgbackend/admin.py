"""The page "Connections" of Django's admin: what this process does with its databases, live.

Django's admin finds this module if ``"pgbackend"`` is in `INSTALLED_APPS`. For another site than
the default one: ``site.register(Connections, ConnectionsAdmin)``. The page is for staff with the
permission ``pgbackend.view_connections``, and for superusers.

A model without a table stands for the page: so it has its place in the index of each site that it
is registered with, a permission to be given to users and groups, and no patch of the admin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.http.response import HttpResponseBase
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.cache import add_never_cache_headers
from django.views.decorators.http import require_safe

from . import metrics, panel, passes
from .models import Connections
from .non_atomic import never_atomic

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Connections]
else:
    _ModelAdmin = admin.ModelAdmin  # which is generic in the stubs only


@admin.register(Connections)
class ConnectionsAdmin(_ModelAdmin):
    """The page, its live updates as JSON, and the text of `pgbackend.dump()`."""

    def get_urls(self) -> list[URLPattern]:
        name = "pgbackend_connections"
        page = self.admin_site.admin_view(require_safe(self.changelist_view))
        return [
            path("", page, name=f"{name}_changelist"),
            path("live/", _without_login(self.live_view), name=f"{name}_live"),
            path("dump/", _without_login(self.dump_view), name=f"{name}_dump"),
        ]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Connections | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Connections | None = None) -> bool:
        return False

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the page."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        shown = panel.contents()
        context = {
            **self.admin_site.each_context(request),
            "title": "Connections",
            "opts": self.opts,
            "panel": shown,
            "tables": panel.tables(shown),
            "servers": panel.servers(),
            "pass": passes.issue(request, self.admin_site.name),
            **(extra_context or {}),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "pgbackend/connections.html", context)

    def live_view(self, request: HttpRequest) -> HttpResponseBase:
        """Answer with the contents of the page as JSON, if need be without asking who asks."""
        given = request.headers.get(passes.HEADER, "")
        if not self._has_pass(request):
            if not self._has_permission(request):
                return JsonResponse({"error": "sign in as staff with the permission"}, status=403)
            given = passes.issue(request, self.admin_site.name)
        return JsonResponse({**panel.contents(), "pass": given})

    def dump_view(self, request: HttpRequest) -> HttpResponseBase:
        """Answer with the text of `pgbackend.dump()`."""
        if not self._has_pass(request):
            return self.admin_site.admin_view(self._dump)(request)
        return _text_of_dump()

    def _dump(self, request: HttpRequest) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        return _text_of_dump()

    def _has_permission(self, request: HttpRequest) -> bool:
        return self.admin_site.has_permission(request) and self.has_view_permission(request)

    def _has_pass(self, request: HttpRequest) -> bool:
        """Return whether a pass stands for the permission: see passes.py."""
        site = self.admin_site.name
        if passes.is_valid(request, site, passes.RENEW):
            return True
        return passes.is_valid(request, site, passes.LONGEST) and panel.is_short()


def _text_of_dump() -> HttpResponse:
    return HttpResponse(metrics.dump(), content_type="text/plain; charset=utf-8")


def _without_login(view: Any) -> Any:
    """Return `view` for GET and HEAD, never cached: without a required login or transaction."""

    @require_safe
    def safe(request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase = view(request)
        add_never_cache_headers(response)
        return response

    never_atomic(safe)
    vars(safe)["login_required"] = False
    return safe
