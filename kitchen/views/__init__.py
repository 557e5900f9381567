"""Holds the pages and endpoints: ``async def`` views over ordinary QuerySets."""
