"""Reading the global attentions of a Gemma-4.

Legend: D model width, Q query heads, G key/value heads, W channels of a head.
"""

import torch
from transformers import Gemma4TextConfig

from trihybrid.models.gemma4.config import key_value_owner
from trihybrid.models.source import TensorSource
from trihybrid.surgery.inherit import Heads
from trihybrid.surgery.layout import rotary_pairs
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.transplant import AttentionWeights


def read_attention(
    source: TensorSource, base: Gemma4TextConfig, index: int, dtype: torch.dtype
) -> AttentionWeights:
    """Read the attention of a global layer in `dtype`. Keys and values of a layer that has none come from the layer
    that owns them, never from what a file may hold under the layer's own name.

    Raises:
        ValueError: a tensor is missing.
    """
    owner = key_value_owner(base, index)
    gain = f"model.layers.{index}.input_layernorm.weight"
    own = {part: f"model.layers.{index}.self_attn.{part}.weight" for part in ("q_proj", "q_norm", "o_proj")}
    values = () if base.attention_k_eq_v else ("v_proj",)
    lent = {part: f"model.layers.{owner}.self_attn.{part}.weight" for part in ("k_proj", "k_norm", *values)}
    names = {gain, *own.values(), *lent.values()}
    missing = sorted(names - set(source.names))
    if missing:
        raise ValueError(f"the teacher has no tensor {missing[0]}; fetch its folder again")
    read = {part: source.read(name).to(dtype) for part, name in (own | lent).items()}
    return AttentionWeights(
        owner,
        gain_D=source.read(gain).to(dtype),
        query=read["q_proj"],
        query_norm=read["q_norm"],
        key=read["k_proj"],
        key_norm=read["k_norm"],
        value=read["k_proj" if base.attention_k_eq_v else "v_proj"],
        output=read["o_proj"],
        names=frozenset(names - {gain}),
    )


def teacher_heads(base: Gemma4TextConfig, section: SurgerySection) -> Heads:
    """How the teacher's global heads split into the student's."""
    wide = base.per_layer_config["full_attention"]
    return Heads(
        query=base.num_attention_heads,
        groups=wide.num_key_value_heads,
        width=wide.head_dim,
        narrow=section.rwkv7.head_dim,
        rotary_pairs=rotary_pairs(base),
        permuted=section.heads == "permuted",
    )
