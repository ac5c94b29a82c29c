"""What a layout costs: parameters, bytes and FLOPs, layer by layer, from the configuration alone.

Bytes count keys and values in bfloat16 and recurrences in float32. FLOPs are matrix products only, two a
multiply-add.
"""

from typing import Any

import torch
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers import initialization as init

from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica
from trihybrid.models.gemma4.config import TrihybridGemma4Config, key_value_owner, teacher_kinds
from trihybrid.models.gemma4.slot import ConvertedSlot

KEY_VALUE_BYTES = 2


def account(
    base: Gemma4TextConfig, student: TrihybridGemma4Config | None, contexts: list[int]
) -> dict[str, Any]:
    """The account of a teacher (`student` None) or of its student.

    Returns:
        parameters (text model, tied head once), global_kv_bytes_per_token, recurrent_state_bytes,
        sliding_cache_bytes, score_flops_per_pair (products of queries and keys, one query-key pair through all
        layers), flops_per_token {context: FLOPs of one token that sees that many}, and `layers`, each with its share.
    """
    with torch.device("meta"), init.no_init_weights():
        teacher = Gemma4ForCausalLM(base)
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
        rest = _weights(layer) - _weights(layer.self_attn)
        products = sum(
            p.numel() for n, p in layer.named_parameters() if p.dim() == 2 and not n.startswith("self_attn.")
        )
        flops = {context: row["flops"][context] + 2 * products for context in contexts}
        layers.append({"index": index, **row, "parameters": row["mixer_parameters"] + rest, "flops": flops})
    fixed = _weights(teacher.model) - sum(_weights(layer) for layer in teacher.model.layers)
    head = base.hidden_size * base.vocab_size + (
        base.hidden_size * base.num_hidden_layers * base.hidden_size_per_layer_input
    )
    untied = 0 if base.tie_word_embeddings else base.hidden_size * base.vocab_size
    return {
        "parameters": fixed + untied + sum(layer["parameters"] for layer in layers),
        "global_kv_bytes_per_token": sum(layer["kv_bytes_per_token"] for layer in layers),
        "recurrent_state_bytes": sum(layer["recurrent_state_bytes"] for layer in layers),
        "sliding_cache_bytes": sum(layer["sliding_cache_bytes"] for layer in layers),
        "score_flops_per_pair": sum(layer["score_flops_per_pair"] for layer in layers),
        "flops_per_token": {str(c): 2 * head + sum(layer["flops"][c] for layer in layers) for c in contexts},
        "layers": [{**layer, "flops": {str(c): n for c, n in layer["flops"].items()}} for layer in layers],
    }


def _retained(
    base: Gemma4TextConfig, index: int, attention: nn.Module, contexts: list[int]
) -> dict[str, Any]:
    kind = teacher_kinds(base)[index]
    owner = key_value_owner(base, index)
    layer = base.per_layer_config[index]
    stored = 2 * layer.num_key_value_heads * layer.head_dim * KEY_VALUE_BYTES if owner == index else 0
    width = base.num_attention_heads * layer.head_dim
    products = sum(p.numel() for p in attention.parameters() if p.dim() == 2)
    seen = {c: min(c, base.sliding_window) if kind == "sliding" else c for c in contexts}
    return {
        "mixers": [kind],
        "mixer_parameters": _weights(attention),
        "keys_values": "own" if owner == index else f"layer {owner}",
        "kv_bytes_per_token": stored if kind == "full" else 0,
        "recurrent_state_bytes": 0,
        # The token itself is not stored: a window of n needs the n - 1 tokens before it.
        "sliding_cache_bytes": stored * (base.sliding_window - 1) if kind == "sliding" else 0,
        "score_flops_per_pair": 2 * width if kind == "full" else 0,
        "flops": {c: 2 * products + 4 * width * seen[c] for c in contexts},
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
    }


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
