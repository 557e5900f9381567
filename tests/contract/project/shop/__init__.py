"""Holds a small project, and its own tests in each of the ways in which projects have them."""
