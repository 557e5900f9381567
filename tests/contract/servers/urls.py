from django.urls import include, path
from django.views.generic import CreateView, ListView, TemplateView

from tests.library.models import Book
from tests.urls import urlpatterns as site

from . import views

contract = [
    path("several/", views.several),
    path("where/", views.where),
    path(
        "shelf/",
        ListView.as_view(
            model=Book, ordering="pk", template_name="names.html", context_object_name="books"
        ),
    ),
    path("my-shelf/", views.Shelf.as_view()),
    path("my-shelf/async/", views.AsyncShelf.as_view()),
    path(
        "page/",
        TemplateView.as_view(
            template_name="names.html", extra_context={"books": Book.objects.order_by("pk")}
        ),
    ),
    path(
        "new/",
        CreateView.as_view(
            model=Book,
            fields=["title", "author", "tags"],
            template_name="form.html",
            success_url="/contract/shelf/",
        ),
    ),
    path("stream/async/", views.stream_async),
    path("stream/sync/", views.stream_sync),
    path("stream/sync-view/", views.stream_from_sync_view),
    path("echo/", views.echo),
    path("hold/", views.hold),
    path("hold/sync/", views.hold_from_sync_view),
]
urlpatterns = [path("contract/", include(contract)), *site]
