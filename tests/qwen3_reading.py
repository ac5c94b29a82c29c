"""A Qwen3-style hybrid of the hxa07 family from its published tensors, written out in float64 without the package.

Legend: T tokens, D model width, H heads, N head width.
"""

from typing import Any

import torch
from torch import Tensor

import hxa07


def logits(revision: str, fields: dict[str, Any], tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Logits [T, V]: recurrences where a layer has `w0`, else attention by content alone."""
    p = {name: tensor.double() for name, tensor in tensors.items()}
    epsilon, width = fields["rms_norm_eps"], fields["head_dim"]
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    theta = None if fields["nope_in_rwkv"] and revision != "hxa07d" else fields["rope_theta"]
    if revision == "hxa07i":
        theta = None
    sizes = hxa07.Sizes(heads, kv_heads, width, theta, epsilon)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight

    h_TD = p["model.embed_tokens.weight"][ids]
    first = None
    for i in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        q = {
            n.removeprefix(f"{prefix}self_attn."): t
            for n, t in p.items()
            if n.startswith(f"{prefix}self_attn.")
        }
        x_TD = norm(h_TD, p[f"{prefix}input_layernorm.weight"])
        if "w0" in q:
            y_TD, _, pairs = hxa07.time_mix(revision, q, x_TD, sizes, first)
            first = first or pairs
        else:
            queries = norm((x_TD @ q["q_proj.weight"].T).unflatten(-1, (heads, width)), q["q_norm.weight"])
            keys = norm((x_TD @ q["k_proj.weight"].T).unflatten(-1, (kv_heads, width)), q["k_norm.weight"])
            values = (x_TD @ q["v_proj.weight"].T).unflatten(-1, (kv_heads, width))
            out = torch.zeros_like(queries)
            for t in range(len(ids)):
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    share = torch.softmax(keys[: t + 1, group] @ queries[t, head] * width**-0.5, 0)
                    out[t, head] = share @ values[: t + 1, group]
            y_TD = out.flatten(1) @ q["o_proj.weight"].T
        h_TD = h_TD + y_TD
        z_TD = norm(h_TD, p[f"{prefix}post_attention_layernorm.weight"])
        h_TD = h_TD + mlp(z_TD, p, f"{prefix}mlp.", fields)
    return norm(h_TD, p["model.norm.weight"]) @ p["lm_head.weight"].T


def mlp(z_TD: Tensor, p: dict[str, Tensor], prefix: str, fields: dict[str, Any]) -> Tensor:
    """One MLP, or the best experts of each token by a softmax over all, their shares made to add up to one."""
    if f"{prefix}gate.weight" not in p:
        return gated(z_TD, p, prefix)
    y_TD = torch.zeros_like(z_TD)
    for t, z_D in enumerate(z_TD):
        share = torch.softmax(p[f"{prefix}gate.weight"] @ z_D, 0)
        best = share.argsort(descending=True)[: fields["num_experts_per_tok"]].tolist()
        for expert in best:
            part = share[expert] / share[best].sum()
            y_TD[t] += part * gated(z_D, p, f"{prefix}experts.{expert}.")
    return y_TD


def gated(z: Tensor, p: dict[str, Tensor], prefix: str) -> Tensor:
    gate = z @ p[f"{prefix}gate_proj.weight"].T
    inner = gate * hxa07.sigmoid(gate) * (z @ p[f"{prefix}up_proj.weight"].T)
    return inner @ p[f"{prefix}down_proj.weight"].T
