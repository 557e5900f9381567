"""Provides the project that django-tenants' own tests import; the tests come with the package.

The names of its modules, apps, models, fields and URLs are those that the tests use.
"""
