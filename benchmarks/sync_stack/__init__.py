"""Measures a project of sync views: the admin, and an API of the REST framework."""
