"""Holds the tenants of django-tenants' own tests, and their domains."""
