"""Runs the own tests of djangorestframework in the contexts of tests/suite."""
