"""Fixtures of the operators' tests."""

from interpreted import load  # noqa: F401
