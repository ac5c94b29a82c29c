"""Values of a teacher's config.json that transformers takes, and with which no model can be built."""

from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trihybrid.models.anatomy import anatomy
from trihybrid.models.pattern import MOST_SLOTS
from trihybrid.models.shapes import TeacherConfig

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "head_dim",
    "global_head_dim",
    "query_pre_attn_scalar",
)
"""Fields that are at least 1 where they are given."""
ROTARY_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


def check_sizes(folder: Path, fields: dict[str, Any]) -> None:
    """Refuse sizes from which not even a configuration can be made. Their types are transformers' to check.

    Raises:
        ValueError: a size below 1, or more layers than any model has.
    """
    for name in SIZES:
        size = fields.get(name)
        if isinstance(size, int | float) and size < 1:
            raise ValueError(f"{folder}: config.json: {name} is {size}; it must be at least 1")
    layers = fields.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_SLOTS:
        raise ValueError(
            f"{folder}: config.json: num_hidden_layers is {layers}; at most {MOST_SLOTS} are read; fetch the file again"
        )


def check_choices(folder: Path, base: TeacherConfig) -> None:
    """Refuse names and numbers that no model can be built with.

    Raises:
        ValueError: an activation or rotary type that transformers does not have; sliding layers without a window;
            experts of which a token cannot use so many.
    """
    for name in ("hidden_act", "hidden_activation"):
        activation = getattr(base, name, None)
        if activation is not None and activation not in ACT2FN:
            raise ValueError(
                f'{folder}: config.json: {name} is "{activation}"; it must be one of {", ".join(sorted(ACT2FN))}'
            )
    rotary = base.rope_parameters or {}
    for part in (rotary, *rotary.values()):
        kind = part.get("rope_type", "default") if isinstance(part, dict) else "default"
        if kind not in ROTARY_TYPES:
            raise ValueError(
                f"{folder}: config.json: rope_type of rope_parameters is {kind!r}; it must be one of "
                f"{', '.join(ROTARY_TYPES)}"
            )
    body = anatomy(base)
    if "sliding" in body.kinds and (body.window is None or body.window < 1):
        raise ValueError(
            f"{folder}: config.json: sliding_window is {body.window}; layers that slide need one of at least 1"
        )
    held, used = body.experts or (0, 0)
    if held and not 1 <= used <= held:
        raise ValueError(
            f"{folder}: config.json: a token uses {used} experts of {held}; it must be 1 to {held}"
        )
