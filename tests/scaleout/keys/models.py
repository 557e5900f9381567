"""Defines the keys that clients have used, each with the answer that was given."""

from django.db import models


class Key(models.Model):
    """Is written in the transaction of the order: both are there, or neither."""

    key = models.CharField(max_length=40, primary_key=True)
    answer = models.JSONField(null=True)

    class Meta:
        app_label = "keys"

    def __str__(self) -> str:
        return self.key
