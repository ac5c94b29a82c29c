"""Converted Gemma-4: configuration and model."""

from trihybrid.models.gemma4.model import (
    TrihybridGemma4Config,
    TrihybridGemma4ForCausalLM,
    TrihybridGemma4Model,
)

__all__ = ["TrihybridGemma4Config", "TrihybridGemma4ForCausalLM", "TrihybridGemma4Model"]
