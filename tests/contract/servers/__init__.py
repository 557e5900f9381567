"""Holds a small project for the contract's tests, and the real servers that serve it."""
