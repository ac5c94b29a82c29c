"""A teacher's folder as it is published: which of its tensors are the text model, which are for images and sound.

Two layouts: text only (`model.layers...`, what `Gemma4ForCausalLM` saves), and multimodal, which the hub has
(`model.language_model.layers...` beside the towers). Surgery and loading know the first kind of name only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Gemma4UnifiedTextConfig

from trihybrid.models.gemma4.config import MEDIA_TOKENS
from trihybrid.models.shapes import CLASSES, TeacherConfig
from trihybrid.models.tensor_files import TensorRange, read_headers, weight_files

MULTIMODAL_TYPE, TEACHER_TYPE = "gemma4", "gemma4_text"
TEXT = "model.language_model."
"""Where the text model stands in the multimodal one; on its own it is `model.`."""
TOWERS = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")


@dataclass(frozen=True)
class PublishedTeacher:
    """A teacher's folder, its headers read.

    Attributes:
        folder: where it is.
        fields: its config.json.
        base: configuration of its text model.
        text: tensors of the text model by the text model's names.
        names: the text model's name of a tensor -> its name in the file.
        towers: tensors for images and sound, by their names in the file.
        strangers: names in the file that are neither.
    """

    folder: Path
    fields: dict[str, Any]
    base: TeacherConfig
    text: dict[str, TensorRange]
    names: dict[str, str]
    towers: dict[str, TensorRange]
    strangers: list[str]


def open_published(folder: Path, fields: dict[str, Any]) -> PublishedTeacher:
    """Read the headers of a folder with the configuration `fields`.

    Raises:
        ValueError: a configuration of another architecture; see `weight_files` and `read_headers`.
    """
    base = text_config(folder, fields)
    found = read_headers(weight_files(folder))
    if not any(name.startswith(TEXT) for name in found):
        return PublishedTeacher(folder, fields, base, found, {name: name for name in found}, {}, [])
    towers = {name: place for name, place in found.items() if name.startswith(TOWERS)}
    names = {
        f"model.{name.removeprefix(TEXT)}" if name.startswith(TEXT) else name: name
        for name in found
        if name.startswith((TEXT, "lm_head."))
    }
    strangers = sorted(found.keys() - towers.keys() - set(names.values()))
    text = {name: found[published] for name, published in names.items()}
    return PublishedTeacher(folder, fields, base, text, names, towers, strangers)


def text_config(folder: Path, fields: dict[str, Any]) -> TeacherConfig:
    """The configuration of the text model in a config.json, with the tokens for images and sound that it stands beside.

    The text model of a unified Gemma 4 becomes the `gemma4_text` that computes the same: one without per-layer inputs.

    Raises:
        ValueError: the configuration of another architecture.
    """
    outer = fields
    fields = fields.get("text_config", fields)
    kind = fields.get("model_type")
    if kind == Gemma4UnifiedTextConfig.model_type:
        kind = TEACHER_TYPE
        fields = Gemma4UnifiedTextConfig.from_dict(fields).to_dict()
        fields |= {"model_type": kind, "hidden_size_per_layer_input": 0, "enable_moe_block": False}
    if kind not in CLASSES:
        raise ValueError(
            f'{folder}: model_type is "{kind}"; a teacher is "{TEACHER_TYPE}" (plans also take '
            '"gemma4_unified_text" and "gemma3_text")'
        )
    carried = ("tie_word_embeddings", "dtype", *MEDIA_TOKENS)
    whole = {name: outer[name] for name in carried if outer.get(name) is not None}
    return CLASSES[kind].from_dict({**fields, **whole})
