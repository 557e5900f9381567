"""Tests others' helpers, as released, in sync, green and async code: see docs/packages.md.

Each module is about one package. Its `CASES` are sync functions, which are called in sync code and
green; its `ASYNC_CASES` are coroutine functions. A case raises if the package does not do what its
documentation says. `__main__.py` runs the cases of all modules in one process.
"""
