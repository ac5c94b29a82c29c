"""Synthetic checkpoints as the hxa07 family is published: names, shapes and configurations, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tiny_gemma4 import build_teacher

VOCABULARY, WIDTH, HEAD, HEADS, KV_HEADS, THETA = 53, 16, 6, 4, 2, 40.0
CHANNELS, KV_CHANNELS = HEADS * HEAD, KV_HEADS * HEAD
LAYERS, ATTENTION = 4, [2]
RANKS = {"w": 3, "a": 4, "g": 5, "v": 2, "k": 7, "dv": 2}
RESIDUAL_V, RESIDUAL_K = ("hxa079", "hxa07d", "hxa07e"), ("hxa079", "hxa07d")

Tensors = dict[str, Tensor]


class Draws:
    """Random tensors from one generator: matrices of unit gain, vectors around a number."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.generator) * (2 / (rows + columns)) ** 0.5

    def vector(self, *shape: int, mean: float = 1.0) -> Tensor:
        return mean + 0.3 * torch.randn(*shape, generator=self.generator)


def time_mix(revision: str, draws: Draws, width: int = WIDTH, first: bool = False) -> Tensors:
    """The tensors of one recurrence, by what follows `self_attn.`."""
    read = CHANNELS if revision == "hxa07e" else width
    tensors = {
        "receptance.weight": draws.matrix(CHANNELS, width),
        "key.weight": draws.matrix(KV_CHANNELS, width),
        "value.weight": draws.matrix(KV_CHANNELS, width),
        "output.weight": draws.matrix(width, CHANNELS),
        "r_norm.weight": draws.vector(HEAD),
        "k_norm.weight": draws.vector(HEAD),
        "w0": draws.vector(1, 1, CHANNELS, mean=-1),
        "a0": draws.vector(1, 1, CHANNELS, mean=0),
    }
    for letter in "wag":
        tensors[f"{letter}1"] = draws.matrix(read, RANKS[letter])
        tensors[f"{letter}2"] = draws.matrix(RANKS[letter], CHANNELS)
    for letter, revisions in (("v", RESIDUAL_V), ("k", RESIDUAL_K)):
        # Training declares them in the first layer too, where nothing is mixed in.
        if revision in revisions:
            tensors[f"{letter}0"] = draws.vector(1, 1, KV_CHANNELS, mean=0)
            tensors[f"{letter}1"] = draws.matrix(width, RANKS[letter])
            tensors[f"{letter}2"] = draws.matrix(RANKS[letter], KV_CHANNELS)
    if revision in ("hxa07b", "hxa07c"):
        tensors |= {"v1": draws.matrix(width, RANKS["v"]), "v2": draws.matrix(RANKS["v"], CHANNELS)}
        tensors |= {"k1": draws.matrix(width, RANKS["k"]), "k2": draws.matrix(RANKS["k"], KV_CHANNELS)}
    if revision == "hxa07e":
        tensors |= {"dv1": draws.matrix(width, RANKS["dv"]), "dv2": draws.matrix(RANKS["dv"], CHANNELS)}
    if revision in ("hxa079", "hxa07d"):
        tensors["r_k"] = draws.vector(HEADS, HEAD, mean=0)
    return tensors


def tica(draws: Draws, width: int) -> Tensors:
    """The tensors of a TICA of four heads on two, eight channels each, by what follows `self_attn.`."""
    return {
        "tiny_q_proj.weight": draws.matrix(32, width),
        "tiny_k_proj.weight": draws.matrix(16, width),
        "tiny_v_proj.weight": draws.matrix(16, width),
        "tiny_o_proj.weight": draws.matrix(width, 32),
        "tiny_q_norm.weight": draws.vector(8),
        "tiny_k_norm.weight": draws.vector(8),
        "tiny_g1": draws.matrix(width, 5),
        "tiny_g2": draws.matrix(5, 32),
    }


def qwen3(revision: str, seed: int = 0, experts: int = 0, **config: Any) -> tuple[dict[str, Any], Tensors]:
    """A Qwen3-style hybrid: recurrences but in layer 2, which is attention without positions. With `experts`, so many
    of them stand in the place of each MLP, stored one by one."""
    draws = Draws(seed)
    tensors = {
        "model.embed_tokens.weight": draws.vector(VOCABULARY, WIDTH, mean=0),
        "model.norm.weight": draws.vector(WIDTH),
        "lm_head.weight": draws.matrix(VOCABULARY, WIDTH),
    }
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        own = {
            "input_layernorm.weight": draws.vector(WIDTH),
            "post_attention_layernorm.weight": draws.vector(WIDTH),
        }
        for place in [f"experts.{e}." for e in range(experts)] or [""]:
            own[f"mlp.{place}gate_proj.weight"] = draws.matrix(20, WIDTH)
            own[f"mlp.{place}up_proj.weight"] = draws.matrix(20, WIDTH)
            own[f"mlp.{place}down_proj.weight"] = draws.matrix(WIDTH, 20)
        if experts:
            own["mlp.gate.weight"] = 3 * draws.matrix(experts, WIDTH)
        if i in ATTENTION:
            mixed = {
                "q_proj.weight": draws.matrix(CHANNELS, WIDTH),
                "k_proj.weight": draws.matrix(KV_CHANNELS, WIDTH),
                "v_proj.weight": draws.matrix(KV_CHANNELS, WIDTH),
                "o_proj.weight": draws.matrix(WIDTH, CHANNELS),
                "q_norm.weight": draws.vector(HEAD),
                "k_norm.weight": draws.vector(HEAD),
            }
        else:
            mixed = time_mix(revision, draws)
        tensors |= {prefix + name: tensor for name, tensor in own.items()}
        tensors |= {f"{prefix}self_attn.{name}": tensor for name, tensor in mixed.items()}
    fields = {
        "architectures": [f"RWKV{revision[3:].upper()}Qwen3ForCausalLM"],
        "auto_map": {"AutoConfig": f"configuration_rwkv{revision[3:]}qwen3.Config"},
        "model_type": f"rwkv{revision[3:]}qwen3",
        "rwkv_architecture": revision,
        "base_model": "Qwen/Qwen3-tiny",
        "transformer_layers": ATTENTION,
        "rwkv_layers": [i for i in range(LAYERS) if i not in ATTENTION],
        "enable_qk_norm": True,
        "nope_in_transformer": True,
        "nope_in_rwkv": False,
        "lora_rank_decay": RANKS["w"],
        "lora_rank_iclr": RANKS["a"],
        "lora_rank_gate": RANKS["g"],
        "attention_bias": False,
        "hidden_size": WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": THETA,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    if experts:
        fields |= {
            "architectures": [f"RWKV{revision[3:].upper()}MoEForCausalLM"],
            "model_type": f"rwkv{revision[3:]}_moe",
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        }
    return fields | config, tensors


def packed(tensors: Tensors) -> Tensors:
    """All experts of a layer in one tensor, gate above up."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}.mlp.experts."
        count = len(tensors[f"model.layers.{i}.mlp.gate.weight"])
        one = [
            {p: tensors[f"{prefix}{e}.{p}_proj.weight"] for p in ("gate", "up", "down")} for e in range(count)
        ]
        found[f"{prefix}gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in one])
        found[f"{prefix}down_proj"] = torch.stack([e["down"] for e in one])
    return found


def gemma4(seed: int = 0, **config: Any) -> tuple[dict[str, Any], Tensors]:
    """A Gemma-4 in hxa07i, multimodal as published: every full layer a recurrence with TICA beside it."""
    teacher = build_teacher(seed=seed)
    draws = Draws(seed)
    width = teacher.config.hidden_size
    full = [i for i, kind in enumerate(teacher.config.layer_types) if kind == "full_attention"]
    tensors = {}
    for name, tensor in teacher.state_dict().items():
        if name != "lm_head.weight" and not any(f"layers.{i}.self_attn" in name for i in full):
            tensors[name.replace("model.", "model.language_model.", 1)] = tensor.clone()
    for i in full:
        mixed = time_mix("hxa07i", draws, width) | tica(draws, width)
        tensors |= {f"model.language_model.layers.{i}.self_attn.{n}": t for n, t in mixed.items()}
    # What the released files hold and nobody reads: another tower, and keys of layers that share another's.
    tensors["model.vision_tower.encoder.weight"] = draws.matrix(4, 4)
    tensors["model.language_model.layers.6.self_attn.k_proj.weight"] = draws.matrix(16, width)
    text = teacher.config.to_dict() | {"model_type": "rwkv07i_gemma4_text"}
    fields = {
        "architectures": ["RWKV07IGemma4ForConditionalGeneration"],
        "model_type": "rwkv07i_gemma4",
        "use_rope_in_rwkv": False,
        "use_rope_in_tiny_attn": False,
        "tiny_attention_layers": full,
        "text_config": text,
        "vision_config": {"hidden_size": 4},
    }
    return fields | config, tensors


def write(folder: Path, fields: dict[str, Any], tensors: Tensors, files: int = 1) -> Path:
    """A folder with these tensors in so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(tensors)
    for number in range(files):
        name = "model.safetensors" if files == 1 else f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({n: tensors[n].contiguous() for n in names[number::files]}, folder / name, {"format": "pt"})
    return folder
