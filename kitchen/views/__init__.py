"""The pages and endpoints: ``async def`` views over ordinary QuerySets."""
