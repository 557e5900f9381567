"""Reads on replicas: what `pgbackend.routers` is made of; nothing is imported unless it is used."""
