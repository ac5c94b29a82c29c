"""The account against what it accounts for: live parameters, live caches, counted products.

Legend: T tokens.
"""

from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Gemma4ForCausalLM

from tiny_gemma4 import LAYERS, VOCABULARY
from tiny_teachers import WINDOW, teacher_config
from trihybrid.models.cache import CACHE
from trihybrid.models.decoder.slot import ConvertedSlot
from trihybrid.models.families import family_of
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.models.gemma4.retained import RetainedAttention
from trihybrid.surgery.cost import account
from trihybrid.surgery.layout import student_config

SECTIONS = {
    "default": {},
    "tica_shared": {"share_kv": "teacher"},
    "rwkv7_shared": {"donor_keys_values": "share"},
    "both_shared": {"share_kv": "teacher", "donor_keys_values": "share"},
    "some": {"pattern": "SSR SSF SSF"},
    "recurrent": {"legend": {"S": "sliding", "R": "rwkv7"}},
    "tica": {"legend": {"S": "sliding", "R": "tica"}},
    "mixed": {
        "pattern": "SSR SSB SST",
        "legend": {"S": "sliding", "R": "rwkv7", "B": ["rwkv7", "tica"], "T": "tica"},
        "share_kv": "teacher",
    },
}
BASES = {
    "shared": {},
    "unshared": {"num_kv_shared_layers": 0},
    "plain": {"hidden_size_per_layer_input": 0, "use_double_wide_mlp": False, "num_kv_shared_layers": 0},
    "two_groups": {"num_key_value_heads": 2},
    "keys_are_values": {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
    "untied": {"tie_word_embeddings": False},
    "experts": {
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 20,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
}


def built(base, config, dtype: torch.dtype = torch.float32):
    model = Gemma4ForCausalLM(base) if config is None else TrihybridGemma4ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


@pytest.mark.parametrize("shape", BASES)
@pytest.mark.parametrize("name", ["teacher", *SECTIONS])
def test_parameters_are_those_of_the_built_model(make_base, make_section, name, shape) -> None:
    base = make_base(**BASES[shape])
    config = None if name == "teacher" else student_config(base, make_section(**SECTIONS[name]))
    costs = account(base, config, [64])
    with torch.device("meta"):
        model = built(base, config)
    assert costs["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for row, layer in zip(costs["layers"], model.model.layers, strict=True):
        assert row["parameters"] == sum(parameter.numel() for parameter in layer.parameters())
        assert row["mixer_parameters"] == sum(parameter.numel() for parameter in layer.self_attn.parameters())


def live_bytes(cache: DynamicCache) -> dict[str, int]:
    """Bytes of all tensors of a cache; a growing slot is one that holds every token."""
    found = {"growing": 0, "sliding": 0, "recurrent": 0}
    for layer in cache.layers:
        keys_values = [
            t for t in (getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None
        ]
        kind = "sliding" if getattr(layer, "is_sliding", False) else "growing"
        found[kind] += sum(t.numel() * t.element_size() for t in keys_values)
        for state in (getattr(layer, "recurrent_states", None) or {}).values():
            found["recurrent"] += 0 if state is None else state.numel() * state.element_size()
    return found


def decode_one(model, context: int) -> tuple[int, DynamicCache]:
    """Products of the token that follows `context` - 1 others, two FLOPs each, and the cache. Without the angles of the
    rotary tables, which older versions of transformers compute as a matrix product of one column and one row."""
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(3, 97, (1, context))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        if context > 1:
            model(tokens[:, :-1], **{CACHE: cache}, use_cache=True)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], **{CACHE: cache}, use_cache=True)
    counts = {part.rpartition(".")[2]: sum(f.values()) for part, f in counter.get_flop_counts().items()}
    return counter.get_total_flops() - counts.get("rotary_emb", 0), cache


@pytest.mark.parametrize("shape", ["shared", "unshared", "keys_are_values"])
@pytest.mark.parametrize("name", ["teacher", *SECTIONS])
def test_bytes_are_those_of_the_live_cache(make_base, make_section, name, shape) -> None:
    base = make_base(**BASES[shape])
    config = None if name == "teacher" else student_config(base, make_section(**SECTIONS[name]))
    costs = account(base, config, [64])
    model = built(base, config, torch.bfloat16)
    cache = DynamicCache(config=model.config)
    tokens = 21
    with torch.no_grad():
        model(torch.randint(3, 97, (1, tokens)), **{CACHE: cache}, use_cache=True)
    live = live_bytes(cache)
    assert live["growing"] == costs["global_kv_bytes_per_token"] * tokens
    assert live["sliding"] == costs["sliding_cache_bytes"]
    assert live["recurrent"] == costs["recurrent_state_bytes"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *product(["teacher", "default", "tica_shared", "both_shared", "some", "mixed"], ["shared", "plain"]),
        *product(["teacher", "mixed"], ["keys_are_values", "experts"]),
    ],
)
def test_flops_are_those_counted_for_one_decoded_token(make_base, make_section, name, shape) -> None:
    """Before, at and past the border of the window of 8."""
    base = make_base(**BASES[shape])
    config = None if name == "teacher" else student_config(base, make_section(**SECTIONS[name]))
    contexts = [1, 5, 8, 30]
    costs = account(base, config, contexts)
    model = built(base, config)
    model.set_attn_implementation("eager")
    if shape == "experts":
        model.set_experts_implementation("eager")
    for context in contexts:
        counted, _ = decode_one(model, context)
        assert counted == costs["flops_per_token"][str(context)], context


@pytest.mark.parametrize("shape", ["shared", "two_groups", "keys_are_values", "experts"])
@pytest.mark.parametrize("name", ["teacher", "default", "both_shared", "mixed"])
def test_bytes_read_are_weights_that_are_used_and_what_mixers_read(
    make_base, make_section, name, shape
) -> None:
    base = make_base(**BASES[shape])
    config = None if name == "teacher" else student_config(base, make_section(**SECTIONS[name]))
    contexts = [1, 8, 30]
    costs = account(base, config, contexts)
    for index, row in enumerate(costs["layers"]):
        mixers = (
            [RetainedAttention(base, index)]
            if config is None or not config.slot_list()[index].converted
            else ConvertedSlot(config, index).mixers()
        )
        others = 2 * (row["active_parameters"] - row["mixer_parameters"])
        for context in contexts:
            read = sum(mixer.cost(context).bytes_read for mixer in mixers)
            assert row["bytes_read"][str(context)] == others + read
    table = LAYERS * base.hidden_size_per_layer_input
    idle = 4 * 3 * 20 * 32 * LAYERS if shape == "experts" else 0
    assert costs["active_parameters"] == costs["parameters"] - idle - VOCABULARY * table
    whole = costs["bytes_read_per_token"]["8"] - sum(row["bytes_read"]["8"] for row in costs["layers"])
    outside = costs["active_parameters"] - sum(row["active_parameters"] for row in costs["layers"])
    assert whole == 2 * (outside + table)


OTHERS = {
    "llama-biased": "FRWB",
    "mistral-windowed": "SRSB",
    "qwen2": "WBRF",
    "qwen3-windowed": "RBSS",
    "qwen3-experts": "FBRF",
    "gemma3": "SBSW",
}
LEGEND = {
    "S": "sliding",
    "F": "full",
    "R": "rwkv7",
    "B": ["rwkv7", "tica"],
    "W": {"mixer": "sliding", "window": WINDOW},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_other_families_cost_what_they_hold_store_and_multiply(make_section, name, side) -> None:
    """Parameters, bytes of a live cache, and products of one decoded token, within the window and past it."""
    base = teacher_config(name)
    config = None
    if side == "student":
        config = student_config(base, make_section(pattern=OTHERS[name], legend=LEGEND))
    contexts = [5, 30]
    costs = account(base, config, contexts)
    family = family_of(base)
    model = (family.teacher(base) if config is None else family.student(config)).eval()
    assert costs["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    idle = 2 * 3 * 16 * 32 * 3 if name == "qwen3-experts" else 0
    table = 0 if base.tie_word_embeddings else VOCABULARY * 32
    assert costs["active_parameters"] == costs["parameters"] - idle - table
    model.set_attn_implementation("eager")
    if name == "qwen3-experts":
        model.set_experts_implementation("eager")
    for context in contexts:
        counted, cache = decode_one(model, context)
        assert counted == costs["flops_per_token"][str(context)], context
    live = live_bytes(cache)
    # Float32: twice the bytes of bfloat16.
    assert live["growing"] == 2 * costs["global_kv_bytes_per_token"] * contexts[-1]
    assert live["sliding"] == 2 * costs["sliding_cache_bytes"]
    assert live["recurrent"] == costs["recurrent_state_bytes"]


def test_rows_add_up(make_base, make_section) -> None:
    base = make_base()
    costs = account(base, student_config(base, make_section()), [16, 64])
    for total, part in (
        ("global_kv_bytes_per_token", "kv_bytes_per_token"),
        ("recurrent_state_bytes", "recurrent_state_bytes"),
        ("sliding_cache_bytes", "sliding_cache_bytes"),
        ("score_flops_per_pair", "score_flops_per_pair"),
    ):
        assert costs[total] == sum(row[part] for row in costs["layers"])
    assert costs["flops_per_token"]["64"] > sum(row["flops"]["64"] for row in costs["layers"])
    both = "rwkv7 own, tica own"
    found = [row["keys_values"] for row in costs["layers"]]
    assert found == ["own", "own", both, "own", "own", both, "layer 4", "layer 4", both]
