"""A teacher's folder as it is published: which of its tensors are the text model, which are for images and sound.

Two layouts: text only (`model.layers...`), and multimodal, where the text model stands inside, under one of several
prefixes. Experts may lie one by one. Surgery and loading know the text model's own names only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import Gemma4TextConfig, Gemma4UnifiedTextConfig

from trihybrid.models.anatomy import anatomy
from trihybrid.models.decoder.config import MEDIA_TOKENS
from trihybrid.models.shapes import CLASSES, TeacherConfig
from trihybrid.models.teacher.experts import single_experts
from trihybrid.models.teacher.values import check_choices, check_sizes
from trihybrid.storage.tensor_files import StoredTensor, TensorJoin, read_headers, weight_files

MULTIMODAL_TYPES = ("gemma4", "gemma4_unified", "gemma3")
"""Model types whose text model can be a teacher."""
TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."))
"""Where the text model stands in the multimodal one, and on its own."""
HEADS = (("language_model.lm_head.", "lm_head."), ("lm_head.", "lm_head."))
TOWERS = re.compile(
    r"^(model\.)?(vision_tower|audio_tower|vision_embedder|embed_vision|embed_audio|multi_modal_projector)\."
)
"""Tensors for images and sound."""


@dataclass(frozen=True)
class PublishedTeacher:
    """A teacher's folder, its headers read.

    Attributes:
        folder: where it is.
        fields: its config.json.
        base: configuration of its text model.
        text: tensors of the text model by the text model's names.
        names: the text model's name of a tensor -> its names in the file, several for experts that lie one by one.
        towers: tensors for images and sound, by their names in the file.
        strangers: names in the file that are neither.
    """

    folder: Path
    fields: dict[str, Any]
    base: TeacherConfig
    text: dict[str, StoredTensor]
    names: dict[str, tuple[str, ...]]
    towers: dict[str, StoredTensor]
    strangers: list[str]


def open_published(folder: Path, fields: dict[str, Any]) -> PublishedTeacher:
    """Read the headers of a folder with the configuration `fields`.

    Raises:
        ValueError: a configuration of another architecture, or one that cannot be; two spellings of one tensor; see
            `weight_files` and `read_headers`.
    """
    base = text_config(folder, fields)
    found: dict[str, StoredTensor] = {**read_headers(weight_files(folder))}
    published = text_names(found)
    towers = {name: place for name, place in found.items() if TOWERS.match(name)}
    strangers = sorted(found.keys() - towers.keys() - set(published.values()))
    text = {name: found[place] for name, place in published.items()}
    names: dict[str, tuple[str, ...]] = {name: (place,) for name, place in published.items()}
    _join_experts(base, text, names)
    return PublishedTeacher(folder, fields, base, text, names, towers, strangers)


def text_names(found: Mapping[str, object]) -> dict[str, str]:
    """The text model's name of every tensor of it -> its name in a file that holds the tensors `found`.

    Raises:
        ValueError: two spellings of one tensor.
    """
    inside = any(name.startswith(prefix) for prefix, _ in TEXT_PREFIXES for name in found)
    spellings = (*TEXT_PREFIXES, *HEADS) if inside else (("", ""),)
    names: dict[str, str] = {}
    for published in found:
        prefix, own = next(((p, o) for p, o in spellings if published.startswith(p)), (None, ""))
        if prefix is None:
            continue
        name = own + published.removeprefix(prefix)
        if name in names:
            raise ValueError(
                f"{published} and {names[name]} are two spellings of one tensor; keep one of them"
            )
        names[name] = published
    return names


def _join_experts(
    base: TeacherConfig, text: dict[str, StoredTensor], names: dict[str, tuple[str, ...]]
) -> None:
    """Put one tensor of all experts in the place of those that lie one by one."""
    experts = anatomy(base).experts
    if experts is None:
        return
    groups = {name.partition(".mlp.experts.0.")[0] for name in text if ".mlp.experts.0." in name}
    for prefix in sorted(groups):
        for name in (f"{prefix}.mlp.experts.gate_up_proj", f"{prefix}.mlp.experts.down_proj"):
            parts = single_experts(name, experts[0])
            if not all(part in text for part in parts):
                continue  # what is missing is found when the model is put together
            places = [text.pop(part) for part in parts]
            rows, columns = places[0].shape
            shape = (experts[0], rows * (len(parts) // experts[0]), columns)
            text[name] = TensorJoin(tuple(one for place in places for one in place.parts), shape)
            names[name] = tuple(published for part in parts for published in names.pop(part))


def text_config(folder: Path, fields: dict[str, Any]) -> TeacherConfig:
    """The configuration of the text model in a config.json, with the tokens for images and sound that it stands beside.

    The text model of a unified Gemma 4 becomes the `gemma4_text` that computes the same: one without per-layer inputs.

    Raises:
        ValueError: the configuration of another architecture, or one that cannot be.
    """
    outer = fields
    fields = fields.get("text_config", fields)
    if not isinstance(fields, dict):
        raise ValueError(f"{folder}: text_config of config.json is no object; fetch the file again")
    check_sizes(folder, fields)
    kind = fields.get("model_type")
    if kind == Gemma4UnifiedTextConfig.model_type:
        kind = Gemma4TextConfig.model_type
        fields = Gemma4UnifiedTextConfig.from_dict(fields).to_dict()
        fields |= {"model_type": kind, "hidden_size_per_layer_input": 0, "enable_moe_block": False}
    if kind not in CLASSES:
        raise ValueError(
            f'{folder}: model_type is "{kind}"; a teacher is one of {", ".join(CLASSES)}, alone or inside of '
            f"{', '.join(MULTIMODAL_TYPES)}"
        )
    whole = {name: outer[name] for name in ("tie_word_embeddings", "dtype") if outer.get(name) is not None}
    for name, spellings in MEDIA_TOKENS.items():
        found = [outer[spelling] for spelling in spellings if outer.get(spelling) is not None]
        if found:
            whole[name] = found[0]
    try:
        base = CLASSES[kind].from_dict({**fields, **whole})
    except StrictDataclassError as error:
        raise ValueError(f"{folder}: {impossible(error)}") from error
    except KeyError as error:  # of rope_parameters that lack one of their type's
        raise ValueError(f"{folder}: config.json cannot be: {error.args[0]}") from error
    check_choices(folder, base)
    return base


def impossible(error: StrictDataclassError) -> str:
    """What transformers says of a configuration that cannot be, in one line."""
    return f"config.json cannot be: {' '.join(str(error.__cause__ or error).split())}"
