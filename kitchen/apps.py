"""Registers the app, and the one signal that it listens to."""

from django.apps import AppConfig
from django.db.models.signals import post_save


class KitchenConfig(AppConfig):
    name = "kitchen"
    verbose_name = "Order desk"

    def ready(self):
        from kitchen import board

        post_save.connect(board.announce_saved, sender="kitchen.Order")
