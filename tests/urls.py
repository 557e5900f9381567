from django.urls import include, path

from proj.urls import urlpatterns as order_desk

urlpatterns = [path("library/", include("tests.library.urls")), *order_desk]
