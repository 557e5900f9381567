"""Provides the table that the tasks write."""

from __future__ import annotations

from django.db import models


class Done(models.Model):
    name = models.CharField(max_length=100, unique=True)
    pid = models.IntegerField()
    session = models.IntegerField()
