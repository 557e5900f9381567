"""Runs a restaurant's order desk: guests order, the kitchen promises, the board shows it live."""
