"""Defines a small project of sync views only, as most projects are."""
