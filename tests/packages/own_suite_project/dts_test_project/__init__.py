"""A project that has what django-tenants' own tests import; they come with the package.

The names of its modules, apps, models, fields and URLs are those that the tests use.
"""
