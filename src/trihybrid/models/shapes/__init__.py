"""Built-in shapes: text configurations of known teachers, so that a plan needs no checkpoint."""

import json
from importlib.resources import files
from pathlib import Path

from transformers import Gemma4TextConfig

ALIASES = {"google/gemma-4-E2B": "gemma-4-e2b", "google/gemma-4-E2B-it": "gemma-4-e2b"}


def shape_names() -> list[str]:
    """Names of the built-in shapes."""
    return sorted(
        Path(entry.name).stem for entry in files(__name__).iterdir() if entry.name.endswith(".json")
    )


def load_shape(name: str) -> Gemma4TextConfig:
    """The text configuration of a built-in shape, by its name or by the hub name of the model that has it.

    Raises:
        ValueError: no such shape.
    """
    stem = ALIASES.get(name, name.lower())
    if stem not in shape_names():
        known = shape_names() + sorted(ALIASES)
        raise ValueError(
            f'no built-in shape "{name}"; known: {", ".join(known)}; or give a folder with a config.json'
        )
    return Gemma4TextConfig.from_dict(json.loads((files(__name__) / f"{stem}.json").read_text()))
