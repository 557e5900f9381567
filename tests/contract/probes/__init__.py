"""Holds scripts that the tests of the contract run in processes of their own."""
