"""Names the app that shows the cluster."""

from django.apps import AppConfig


class ClusterConfig(AppConfig):
    name = "proj.cluster"
    label = "cluster"
