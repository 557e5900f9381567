"""The models of a tenant of another type."""
