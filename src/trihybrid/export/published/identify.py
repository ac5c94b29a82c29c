"""Which revision a published configuration means, on which teacher, and what is refused by name.

The keys are those of the published configurations (`rwkv_architecture`, `nope_in_rwkv`, `transformer_layers`, ..);
everything that is not the family's own describes the teacher and is kept as it is.
"""

import re
from dataclasses import dataclass
from typing import Any

from trihybrid.mixers.rwkv7 import REVISIONS, Revision

OWN = (
    "architectures",
    "auto_map",
    "base_model",
    "description",
    "enable_qk_norm",
    "first_attention_layer",
    "attention_striping",
    "last_striping_layer",
    "model_revision",
    "model_type",
    "nope_in_rwkv",
    "nope_in_transformer",
    "rwkv_architecture",
    "rwkv_layers",
    "transformer_layers",
    "transformers_version",
    "use_rope",
    "use_rope_in_rwkv",
    "use_rope_in_tiny_attn",
)
OWN_PREFIXES = ("lora_rank_", "tiny_")
"""Keys that say something about the student, by name and by how they begin."""


@dataclass(frozen=True)
class Published:
    """What a configuration says.

    Attributes:
        revision: what the mixers compute.
        teacher: transformers' model type of the teacher's text model.
        base: the teacher's own fields.
        rope_base: of the positions of r and k; None where they have none.
        attention_layers: layers that stayed attention, where the configuration lists them.
        tica_layers: layers with TICA, where the configuration lists them.
        head_dim: channels of a recurrence's head, where the configuration gives them.
        qk_norm: whether r and k are normed, where the configuration says so.
        nope: whether attention layers that stayed have no positions.
    """

    revision: Revision
    teacher: str
    base: dict[str, Any]
    rope_base: float | None
    attention_layers: frozenset[int] | None
    tica_layers: frozenset[int] | None
    head_dim: int | None
    qk_norm: bool | None
    nope: bool


def identify(config: dict[str, Any], revision: str | None = None) -> Published:
    """Read a configuration, the text model's part of it where there are several.

    Args:
        config: of the folder.
        revision: its revision, where the configuration does not say or says it wrongly.

    Raises:
        ValueError: no revision that is known, one whose equations are not public, a teacher that cannot be hosted, or
            flags that contradict each other; names the field and what can be done.
    """
    fields = {**{k: v for k, v in config.items() if k != "text_config"}, **config.get("text_config", {})}
    said = " ".join(
        str(part)
        for source in (config, fields)
        for part in (source.get("model_type"), source.get("architectures"), source.get("base_model"))
    ).lower()
    found = _revision(config, fields, revision)
    teacher = _teacher(said, fields, found)
    if fields.get("use_rope_in_tiny_attn"):
        raise ValueError("use_rope_in_tiny_attn is true; TICA has no positions in any revision that is known")
    layers, tiny = fields.get("transformer_layers"), fields.get("tiny_attention_layers")
    return Published(
        revision=found,
        teacher=teacher,
        base={k: v for k, v in fields.items() if k not in OWN and not k.startswith(OWN_PREFIXES)},
        rope_base=_rope_base(fields, found),
        attention_layers=frozenset(layers) if teacher != "gemma4_text" and layers is not None else None,
        tica_layers=None if tiny is None else frozenset(tiny),
        head_dim=None if teacher == "gemma4_text" else fields.get("head_dim"),
        qk_norm=fields.get("enable_qk_norm"),
        nope=bool(fields.get("nope_in_transformer", teacher != "gemma4_text")),
    )


def _revision(config: dict[str, Any], fields: dict[str, Any], given: str | None) -> Revision:
    if given is not None:
        name = given.lower()
    else:
        said = {}
        for key in ("rwkv_architecture", "model_type", "architectures", "auto_map"):
            text = str([fields.get(key), config.get(key)]).lower()
            matches = set(re.findall(r"(?:hxa|cxa|rwkv)_?(0?7[0-9a-z])", text))
            if matches:
                said[key] = {match if match.startswith("0") else f"0{match}" for match in matches}
        names = set().union(*said.values())
        if len(names) != 1:
            listed = ", ".join(f"{key}: {sorted(value)}" for key, value in said.items())
            what = f"says different revisions ({listed})" if names else "names no revision"
            raise ValueError(f"the configuration {what}; give one of {', '.join(REVISIONS)} with --revision")
        name = f"hxa{names.pop()}"
    if name not in REVISIONS:
        raise ValueError(
            f"revision {name.removeprefix('hxa')}: its equations are not public, or older than what is read here, "
            f"{', '.join(REVISIONS)}"
        )
    return REVISIONS[name]


def _teacher(said: str, fields: dict[str, Any], revision: Revision) -> str:
    if "glm" in said or fields.get("kv_lora_rank") is not None:
        raise ValueError(
            f"{revision.name} on GLM: it keeps the teacher's multi-head latent attention (q_lora_rank, kv_lora_rank) "
            "for r, k and v, which no mixer here has; it cannot be read"
        )
    if "gemma" in said or fields.get("hidden_size_per_layer_input") is not None:
        return "gemma4_text"
    if fields.get("enable_qk_norm") is False:
        raise ValueError(
            "enable_qk_norm is false: the teacher norms neither queries nor keys, so it is no Qwen3; only students of "
            "Qwen3 and Gemma 4 are read"
        )
    return "qwen3_moe" if fields.get("num_experts") else "qwen3"


def _rope_base(fields: dict[str, Any], revision: Revision) -> float | None:
    nope, use = fields.get("nope_in_rwkv"), fields.get("use_rope_in_rwkv", fields.get("use_rope"))
    if nope is not None and use is not None and bool(nope) == bool(use):
        raise ValueError(
            f"nope_in_rwkv is {nope} and use_rope is {use}, which contradict each other; correct config.json"
        )
    wanted = not nope if nope is not None else True if use is None else bool(use)
    if revision.rope == "never":
        if use:
            raise ValueError(f"use_rope is {use}; {revision.name} has no positions in its recurrence")
        return None
    if revision.rope == "configured" and not wanted:
        return None
    parameters = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    kind = parameters.get("rope_type", scaling.get("rope_type", scaling.get("type", "default")))
    if kind != "default":
        raise ValueError(
            f'rope_scaling is of type "{kind}"; r and k are turned by plain frequencies only, "default"'
        )
    base = parameters.get("rope_theta", fields.get("rope_theta"))
    if base is None:
        raise ValueError(f"rope_theta is missing; {revision.name} turns r and k by it")
    return float(base)
