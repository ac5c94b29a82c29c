"""Converted Gemma-4: configuration, slot, model, and their registration with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from trihybrid.models.gemma4.config import TrihybridGemma4Config
from trihybrid.models.gemma4.model import TrihybridGemma4ForCausalLM, TrihybridGemma4Model


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know `trihybrid_gemma4`; safe to call again."""
    AutoConfig.register(TrihybridGemma4Config.model_type, TrihybridGemma4Config, exist_ok=True)
    AutoModel.register(TrihybridGemma4Config, TrihybridGemma4Model, exist_ok=True)
    AutoModelForCausalLM.register(TrihybridGemma4Config, TrihybridGemma4ForCausalLM, exist_ok=True)
