"""The models of a tenant."""
