"""Configures the site that ``wagtail start`` has generated, and fills it with pages."""
