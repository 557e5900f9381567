"""Tests that what the pages of docs/ show works."""
