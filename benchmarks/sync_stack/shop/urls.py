"""Defines the admin and the API, as a project would."""

from django.contrib import admin
from django.urls import include, path
from rest_framework import serializers, viewsets
from rest_framework.routers import DefaultRouter

from .models import Author, Book


@admin.register(Book)
class BookAdmin(admin.ModelAdmin):
    list_display = ("title", "author", "price", "published")
    list_select_related = ("author",)
    list_per_page = 25
    search_fields = ("title",)
    raw_id_fields = ("author",)


class AuthorSerializer(serializers.ModelSerializer):
    class Meta:
        model = Author
        fields = ("id", "name")


class BookSerializer(serializers.ModelSerializer):
    author_details = AuthorSerializer(source="author", read_only=True)

    class Meta:
        model = Book
        fields = ("id", "title", "author", "author_details", "price", "published")


class BookViewSet(viewsets.ModelViewSet):
    queryset = Book.objects.select_related("author").order_by("pk")
    serializer_class = BookSerializer


router = DefaultRouter()
router.register("books", BookViewSet)
urlpatterns = [path("admin/", admin.site.urls), path("api/", include(router.urls))]
