"""A model without a table: it gives the admin's page its place in the index, and its permission."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class NoRows(models.Manager["Connections"]):
    """A manager that finds no rows and asks no database: `dumpdata` reads each model."""

    def get_queryset(self) -> models.QuerySet[Connections]:
        return super().get_queryset().none()


class Connections(models.Model):
    """The connections of a process, for the permission ``pgbackend.view_connections``."""

    name: models.TextField[str, str] = models.TextField(primary_key=True)

    objects = NoRows()

    class Meta:
        managed = False
        base_manager_name = "objects"
        default_permissions: ClassVar[tuple[str, ...]] = ("view",)
        verbose_name = "connections"
        verbose_name_plural = "connections"

    def __str__(self) -> str:
        return self.name
