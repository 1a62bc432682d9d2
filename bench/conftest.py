"""Fixtures that benchmarks share with the tests."""

from tests.conftest import generator

__all__ = ["generator"]
