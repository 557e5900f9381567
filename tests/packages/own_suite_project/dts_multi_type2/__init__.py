"""Holds the models of a tenant of another type."""
