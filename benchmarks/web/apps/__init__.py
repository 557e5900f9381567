"""Holds the programs that are measured: one site, written for each stack in its own idiom."""
