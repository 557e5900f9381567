"""Holds helpers for tests of several directories: loops, sweeps, links, pools, a site."""
