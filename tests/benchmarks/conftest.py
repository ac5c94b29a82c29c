"""Fixtures of the benchmarks' tests."""

from interpreted import load  # noqa: F401
