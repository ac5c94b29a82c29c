"""What a layout costs: parameters, bytes and FLOPs, layer by layer, from the configuration alone.

Bytes count weights, keys and values in bfloat16 and recurrences in float32. FLOPs are matrix products only, two a
multiply-add. Of the experts of a layer a token passes some; the others are idle: held, but not read.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica
from trihybrid.models.anatomy import Anatomy, anatomy
from trihybrid.models.decoder.config import SlotSizes
from trihybrid.models.decoder.slot import ConvertedSlot
from trihybrid.models.families import family_of
from trihybrid.models.pattern import Slot
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
    body = anatomy(base)
    slots = [None] * len(body.attentions) if student is None else student.slot_list()
    with torch.device("meta"), init.no_init_weights():
        teacher = family_of(base).teacher(base)
        converted = {
            i: ConvertedSlot(student, i)
            for i, slot in enumerate(slots)
            if student and slot and slot.converted
        }
    layers = []
    for index, (layer, slot) in enumerate(zip(teacher.model.layers, slots, strict=True)):
        row = (
            _converted(converted[index], contexts)
            if index in converted
            else _retained(body, index, slot, layer.self_attn, contexts)
        )
        layers.append({"index": index, **_with_the_rest(body, layer, row)})
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


def _with_the_rest(body: Anatomy, layer: nn.Module, row: dict[str, Any]) -> dict[str, Any]:
    """A mixer's row with all that stands in the layer beside it: norms, MLP, router and experts, per-layer input."""
    others = [p for name, p in layer.named_parameters() if not name.startswith("self_attn.")]
    rest = sum(p.numel() for p in others)
    experts = sum(p.numel() for p in others if p.dim() == 3)
    held, used = body.experts or (1, 1)
    active = experts * used // held
    idle = experts - active
    products = sum(p.numel() for p in others if p.dim() == 2) + active
    return row | {
        "parameters": row["mixer_parameters"] + rest,
        "active_parameters": row["mixer_parameters"] + rest - idle,
        "flops": {str(c): n + 2 * products for c, n in row["flops"].items()},
        "bytes_read": {str(c): n + VALUE_BYTES * (rest - idle) for c, n in row["bytes_read"].items()},
    }


def _retained(
    body: Anatomy, index: int, slot: Slot | None, attention: nn.Module, contexts: list[int]
) -> dict[str, Any]:
    """The row of a teacher's attention, in its own place (`slot` None) or in a student's."""
    layer = body.attentions[index]
    kind, window = (layer.kind, body.window) if slot is None else (slot.mixers[0], slot.window or body.window)
    if kind == "full":
        window = None
    token = 2 * layer.kv_heads * layer.head_dim * VALUE_BYTES
    stored = token if layer.owner == index else 0
    products = sum(p.numel() for p in attention.parameters() if p.dim() == 2)
    weights = _weights(attention)
    seen = {c: c if window is None else min(c, window) for c in contexts}
    return {
        "mixers": [kind],
        "mixer_parameters": weights,
        "keys_values": "own" if layer.owner == index else f"layer {layer.owner}",
        "kv_bytes_per_token": stored if window is None else 0,
        "recurrent_state_bytes": 0,
        # The token itself is not stored: a window of n needs the n - 1 tokens before it.
        "sliding_cache_bytes": 0 if window is None else stored * (window - 1),
        "score_flops_per_pair": 2 * layer.width if window is None else 0,
        "flops": {c: 2 * products + 4 * layer.width * seen[c] for c in contexts},
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
