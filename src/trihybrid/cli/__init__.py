"""The command line: a thin layer that turns options into calls, and users' errors into one line and exit code 2."""

from trihybrid.cli import benching, chatting, conversion, exchange, models, serving, training
from trihybrid.cli.frame import app, guarded

__all__ = ["app", "benching", "chatting", "conversion", "exchange", "main", "models", "serving", "training"]


def main() -> None:
    """Entry point: errors of the user become one line and exit code 2."""
    guarded(app)
