"""The forward pass of teachers and students over an engine's states, with the model's own weights."""

from trihybrid.infer.network.model import Network

__all__ = ["Network"]
