"""Holds the Django stacks: they share models, settings and URLs; the views are each stack's own."""
