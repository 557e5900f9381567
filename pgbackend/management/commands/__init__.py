"""The module of `manage.py pgbackend`, by whose name Django finds it."""
