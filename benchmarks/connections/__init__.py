"""Measures how many connections requests in flight use, beside a model that predicts it."""
