"""Provides the tables that the helpers read and write."""

from __future__ import annotations

from django.db import models
from postgres_copy import CopyManager


class Part(models.Model):
    name = models.CharField(max_length=100, unique=True)
    stock = models.IntegerField(default=0, db_index=True)

    objects = CopyManager()
