"""Maps the site's addresses when it is served on a cluster: the pages of the cluster beside it."""

from django.urls import include, path

from proj.cluster import views

_cluster = [
    path("", views.page, name="page"),
    path("topology.json", views.as_json, name="json"),
    path("<str:what>/", views.act, name="act"),
]

urlpatterns = [
    path("cluster/", include((_cluster, "cluster"))),
    path("", include("proj.urls")),
]
