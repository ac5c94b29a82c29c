"""Fixtures of the tests of a step's kernels."""

from interpreted import load  # noqa: F401
