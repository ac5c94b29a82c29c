"""Built-in shapes: text configurations of known teachers, so that a plan needs no checkpoint.

Where the numbers come from: the tables of variants in transformers' conversion scripts of the published weights,
`models/gemma4/convert_gemma4_weights.py` (E2B, E4B, 26B-A4B, 31B), `models/gemma4_unified/
convert_gemma4_unified_weights.py` (12B) and `models/gemma3/convert_gemma3_weights.py` (Gemma 3), with what they leave
to the defaults of the configuration classes written out. The files of Gemma 3 from 4B on have 64 more rows in the
vocabulary (262,208) than the script. Checked against the parameter counts that the Hugging Face hub states for the
published files (Gemma 4, to the last parameter) and KerasHub's presets (Gemma 3): `tests/surgery/test_shapes.py`.

Of Qwen3, Llama 3.2 and Mistral: the published config.json of the models that the aliases name, whose parameter counts
the class has to the last one.

The 12B is published as `gemma4_unified_text`: the text model of Gemma 4 without per-layer inputs and experts. Here it
is the `gemma4_text` that computes the same.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

from transformers import (
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

TeacherConfig: TypeAlias = PreTrainedConfig

CLASSES: dict[str, type[TeacherConfig]] = {
    config.model_type: config
    for config in (
        Gemma4TextConfig,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )
}
"""Model type of a teacher -> class of its configuration."""

ALIASES = {
    f"google/{family}-{size}{ending}": f"{family}-{size}".lower()
    for family, sizes, endings in (
        ("gemma-4", ("E2B", "E4B", "12B", "26B-A4B", "31B"), ("", "-it")),
        ("gemma-3", ("1b", "4b", "12b", "27b"), ("-pt", "-it")),
    )
    for size in sizes
    for ending in endings
} | {
    "Qwen/Qwen3-1.7B": "qwen3-1.7b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "mistralai/Mistral-7B-v0.3": "mistral-7b-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b-v0.3",
}


def shape_names() -> list[str]:
    """Names of the built-in shapes."""
    return sorted(
        Path(entry.name).stem for entry in files(__name__).iterdir() if entry.name.endswith(".json")
    )


def load_shape(name: str) -> TeacherConfig:
    """The text configuration of a built-in shape, by its name or by the hub name of the model that has it.

    Raises:
        ValueError: no such shape.
    """
    stem = ALIASES.get(name, name.lower())
    if stem not in shape_names():
        raise ValueError(
            f'no built-in shape "{name}"; known: {", ".join(shape_names())} and their hub names, as '
            f"{min(ALIASES)}; or give a folder with a config.json"
        )
    fields = json.loads((files(__name__) / f"{stem}.json").read_text())
    return CLASSES[fields["model_type"]].from_dict(fields)
