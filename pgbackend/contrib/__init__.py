"""Extras that need other packages: exporters of metrics. Nothing in the engine imports them."""
