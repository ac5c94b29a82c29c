"""Converted Gemma-4: configuration, model, and their registration with transformers' Auto classes."""

from trihybrid.models.decoder.language_model import register_family
from trihybrid.models.gemma4.model import (
    TrihybridGemma4Config,
    TrihybridGemma4ForCausalLM,
    TrihybridGemma4Model,
)

__all__ = ["TrihybridGemma4Config", "TrihybridGemma4ForCausalLM", "TrihybridGemma4Model", "register"]


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know `trihybrid_gemma4`; safe to call again."""
    register_family(TrihybridGemma4ForCausalLM)
