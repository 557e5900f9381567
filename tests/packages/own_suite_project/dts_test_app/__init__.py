"""Holds the models of a tenant."""
