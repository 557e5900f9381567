"""Lets a client repeat an order whose outcome it does not know: it is placed once."""
