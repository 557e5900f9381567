"""Builds a release and checks it: `make release`. docs/releases.md tells what is checked."""
