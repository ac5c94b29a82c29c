"""What a layout costs: parameters, bytes and FLOPs, layer by layer, from the configuration alone.

Bytes count weights, keys and values in bfloat16 and recurrences in float32. FLOPs are matrix products only, two a
multiply-add. Of the experts of a layer, a token passes `top_k_experts`; the others are idle: held, but not read.
"""

from typing import Any

import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma4ForCausalLM
from transformers import initialization as init

from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica
from trihybrid.models.gemma4.config import SlotSizes, key_value_owner, teacher_kinds
from trihybrid.models.gemma4.slot import ConvertedSlot
from trihybrid.models.shapes import TeacherConfig

VALUE_BYTES = 2


def account(base: TeacherConfig, student: SlotSizes | None, contexts: list[int]) -> dict[str, Any]:
    """The account of a teacher (`student` None) or of its student.

    Returns:
        parameters (text model, tied head once), active_parameters (without idle experts and without tables that a token
        only takes a row of), global_kv_bytes_per_token, recurrent_state_bytes, sliding_cache_bytes,
        score_flops_per_pair (products of queries and keys, one query-key pair through all layers), flops_per_token and
        bytes_read_per_token {context: FLOPs, and bytes of weights and states, of decoding one token that sees that many
        in a batch of one}, and `layers`, each with its share.
    """
    with torch.device("meta"), init.no_init_weights():
        teacher = (Gemma3ForCausalLM if base.model_type == "gemma3_text" else Gemma4ForCausalLM)(base)
        slots = {}
        if student is not None:
            slots = {
                i: ConvertedSlot(student, i) for i, slot in enumerate(student.slot_list()) if slot.converted
            }
    layers = []
    for index, layer in enumerate(teacher.model.layers):
        row = (
            _converted(slots[index], contexts)
            if index in slots
            else _retained(base, index, layer.self_attn, contexts)
        )
        layers.append({"index": index, **_with_the_rest(base, layer, row)})
    per_layer_width = base.num_hidden_layers * getattr(base, "hidden_size_per_layer_input", 0)
    head = base.hidden_size * base.vocab_size
    fixed = _weights(teacher.model) - sum(_weights(layer) for layer in teacher.model.layers)
    tables = _weights(getattr(teacher.model, "embed_tokens_per_layer", nn.Module()))
    rows = per_layer_width
    if not base.tie_word_embeddings:
        fixed, tables, rows = fixed + head, tables + head, rows + base.hidden_size
    products = head + base.hidden_size * per_layer_width
    read = VALUE_BYTES * (fixed - tables + rows)
    return {
        "parameters": fixed + sum(layer["parameters"] for layer in layers),
        "active_parameters": fixed - tables + sum(layer["active_parameters"] for layer in layers),
        "global_kv_bytes_per_token": sum(layer["kv_bytes_per_token"] for layer in layers),
        "recurrent_state_bytes": sum(layer["recurrent_state_bytes"] for layer in layers),
        "sliding_cache_bytes": sum(layer["sliding_cache_bytes"] for layer in layers),
        "score_flops_per_pair": sum(layer["score_flops_per_pair"] for layer in layers),
        "flops_per_token": {
            str(c): 2 * products + sum(layer["flops"][str(c)] for layer in layers) for c in contexts
        },
        "bytes_read_per_token": {
            str(c): read + sum(layer["bytes_read"][str(c)] for layer in layers) for c in contexts
        },
        "layers": layers,
    }


def _with_the_rest(base: TeacherConfig, layer: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
    """A mixer's row with all that stands in the layer beside it: norms, MLP, router and experts, per-layer input."""
    others = [p for name, p in layer.named_parameters() if not name.startswith("self_attn.")]
    rest = sum(p.numel() for p in others)
    experts = sum(p.numel() for p in others if p.dim() == 3)
    active = experts * base.top_k_experts // base.num_experts if experts else 0
    idle = experts - active
    products = sum(p.numel() for p in others if p.dim() == 2) + active
    return row | {
        "parameters": row["mixer_parameters"] + rest,
        "active_parameters": row["mixer_parameters"] + rest - idle,
        "flops": {str(c): n + 2 * products for c, n in row["flops"].items()},
        "bytes_read": {str(c): n + VALUE_BYTES * (rest - idle) for c, n in row["bytes_read"].items()},
    }


def _retained(base: TeacherConfig, index: int, attention: nn.Module, contexts: list[int]) -> dict[str, Any]:
    kind = teacher_kinds(base)[index]
    owner = key_value_owner(base, index)
    layer = base.per_layer_config[index]
    token = 2 * layer.num_key_value_heads * layer.head_dim * VALUE_BYTES
    stored = token if owner == index else 0
    width = base.num_attention_heads * layer.head_dim
    products = sum(p.numel() for p in attention.parameters() if p.dim() == 2)
    weights = _weights(attention)
    seen = {c: min(c, base.sliding_window) if kind == "sliding" else c for c in contexts}
    return {
        "mixers": [kind],
        "mixer_parameters": weights,
        "keys_values": "own" if owner == index else f"layer {owner}",
        "kv_bytes_per_token": stored if kind == "full" else 0,
        "recurrent_state_bytes": 0,
        # The token itself is not stored: a window of n needs the n - 1 tokens before it.
        "sliding_cache_bytes": stored * (base.sliding_window - 1) if kind == "sliding" else 0,
        "score_flops_per_pair": 2 * width if kind == "full" else 0,
        "flops": {c: 2 * products + 4 * width * seen[c] for c in contexts},
        # A layer that shares keys and values does not store them, but reads them again.
        "bytes_read": {c: VALUE_BYTES * weights + token * seen[c] for c in contexts},
    }


def _converted(slot: ConvertedSlot, contexts: list[int]) -> dict[str, Any]:
    recurrent = sum(mixer.cost(1).state_bytes for mixer in slot.mixers() if isinstance(mixer, Rwkv7))
    attentions = [mixer for mixer in slot.mixers() if isinstance(mixer, Tica)]
    donors = {mixer.kind: mixer.donor for mixer in slot.mixers()}
    return {
        "mixers": list(donors),
        "mixer_parameters": _weights(slot),
        "keys_values": ", ".join(f"{k} {'own' if d is None else f'slot {d}'}" for k, d in donors.items()),
        "kv_bytes_per_token": sum(mixer.cost(1).state_bytes for mixer in attentions),
        "recurrent_state_bytes": recurrent,
        "sliding_cache_bytes": 0,
        "score_flops_per_pair": sum(2 * m.options.heads * m.options.head_dim for m in attentions),
        "flops": {c: sum(mixer.cost(c).flops for mixer in slot.mixers()) for c in contexts},
        "bytes_read": {c: sum(mixer.cost(c).bytes_read for mixer in slot.mixers()) for c in contexts},
    }


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
