"""A Gemma-4 layer written out again from its formulas, in float64, with every kind of mixer in it. No code of the
package or of transformers is used: tensors by name, configurations as plain dictionaries.

Sources: transformers' modelling file of Gemma 4 for the layer; the model card of the hxa07i release for rwkv7 and tica.

Legend: T tokens, S keys, H heads, N head width, D model width, P width of a per-layer input.
"""

import math
from typing import Any

import torch
from torch import Tensor

import hxa07

Weights = dict[str, Tensor]


class Reading:
    """A whole sequence through all layers, each fed what was recorded.

    Args:
        weights: all tensors of the model.
        config: of a student or a teacher, as it is saved.
        steps: tokens of each step, after which states are wanted.
    """

    def __init__(self, weights: Weights, config: dict[str, Any], steps: list[int]) -> None:
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self.base = config.get("base_config", config)
        kinds = {"sliding_attention": "sliding", "full_attention": "full"}
        own = [{"mixers": [kinds[kind]], "donors": {}} for kind in self.base["layer_types"]]
        self.slots = config.get("slots") or own
        self.rwkv7, self.tica = config.get("rwkv7"), config.get("tica")
        self.ends = [sum(steps[: place + 1]) for place in range(len(steps))]
        self.stored: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def layer(
        self, i: int, h_TD: Tensor, p_TP: Tensor | None
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """What is recorded of layer i on the stream h, and its state after each step."""
        found, weights = {}, self.under(f"layers.{i}.")
        x_TD = found["mixer.input"] = self.norm(h_TD, weights["input_layernorm.weight"])
        states: list[dict[str, Tensor]] = [{} for _ in self.ends]
        y_TD = torch.zeros_like(x_TD)
        for kind in self.slots[i]["mixers"]:
            one_TD, after = getattr(self, "recurrence" if kind == "rwkv7" else "attention")(i, kind, x_TD)
            y_TD = y_TD + one_TD
            if kind in ("rwkv7", "tica"):
                found[f"{kind}.output"] = one_TD
            for state, more in zip(states, after, strict=True):
                state |= more
        found["mixer.output"] = y_TD
        h_TD = h_TD + self.norm(y_TD, weights["post_attention_layernorm.weight"])
        z_TD = found["mlp.input"] = self.norm(h_TD, weights["pre_feedforward_layernorm.weight"])
        inner = gelu(z_TD @ weights["mlp.gate_proj.weight"].T) * (z_TD @ weights["mlp.up_proj.weight"].T)
        m_TD = found["mlp.output"] = inner @ weights["mlp.down_proj.weight"].T
        h_TD = h_TD + self.norm(m_TD, weights["post_feedforward_layernorm.weight"])
        if p_TP is not None:
            gated = gelu(h_TD @ weights["per_layer_input_gate.weight"].T) * p_TP
            projected = gated @ weights["per_layer_projection.weight"].T
            h_TD = h_TD + self.norm(projected, weights["post_per_layer_input_norm.weight"])
        found["output"] = h_TD * weights["layer_scalar"]
        return found, states

    def attention(self, i: int, kind: str, x_TD: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Of the teacher (`full`, `sliding`), or `tica`."""
        ours = kind == "tica"
        p = self.under(f"layers.{i}.self_attn.{'tica.' if ours else ''}")
        width = len(p["q_norm.weight"])
        heads = self.tica["heads"] if ours else self.base["num_attention_heads"]
        window = self.base["sliding_window"] if kind == "sliding" else None
        q_THN = self.norm(split(x_TD @ p["q_proj.weight"].T, width), p["q_norm.weight"])
        if not ours:
            q_THN = self.turned(q_THN, kind, width)
        owner = self.owner(i, kind)
        if owner == i:
            k_SGN = self.norm(split(x_TD @ p["k_proj.weight"].T, width), p["k_norm.weight"])
            v_SGN = split(x_TD @ p["v_proj.weight"].T, width)
            if not ours:
                k_SGN, v_SGN = self.turned(k_SGN, kind, width), self.norm(v_SGN)
            self.stored[kind, i] = k_SGN, v_SGN
        k_SGN, v_SGN = self.stored[kind, owner]
        outputs = torch.zeros_like(q_THN)
        for t in range(len(x_TD)):
            first = 0 if window is None else max(0, t - window + 1)
            for h in range(heads):
                g = h // (heads // k_SGN.shape[1])
                scores = k_SGN[first : t + 1, g] @ q_THN[t, h] * (width**-0.5 if ours else 1.0)
                share = torch.exp(scores - scores.max())
                outputs[t, h] = (share / share.sum()) @ v_SGN[first : t + 1, g]
        o_TC = outputs.flatten(1)
        if ours:
            o_TC = o_TC * (hxa07.sigmoid(x_TD @ p["g1"]) @ p["g2"])
        kept = [slice(max(0, end - window + 1) if window else 0, end) for end in self.ends]
        states = [
            {"keys": k_SGN[part].transpose(0, 1), "values": v_SGN[part].transpose(0, 1)} if owner == i else {}
            for part in kept
        ]
        return o_TC @ p["o_proj.weight"].T, states

    def recurrence(self, i: int, kind: str, x_TD: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """hxa07i, token by token."""
        p = self.under(f"layers.{i}.self_attn.rwkv7.")
        sizes = hxa07.Sizes(
            self.rwkv7["heads"],
            self.rwkv7["kv_heads"],
            self.rwkv7["head_dim"],
            None,
            self.base["rms_norm_eps"],
        )
        y_TD, _, _ = hxa07.time_mix("hxa07i", p, x_TD, sizes)
        states = [{"matrix": hxa07.time_mix("hxa07i", p, x_TD[:end], sizes)[1]} for end in self.ends]
        return y_TD, states

    def owner(self, i: int, kind: str) -> int:
        if kind == "tica":
            return self.slots[i].get("donors", {}).get("tica", i)
        first_shared = self.base["num_hidden_layers"] - self.base["num_kv_shared_layers"]
        types = self.base["layer_types"]
        return i if i < first_shared else max(j for j in range(first_shared) if types[j] == types[i])

    def turned(self, x_THN: Tensor, kind: str, width: int) -> Tensor:
        """Rotate-half: pairs (c, c + N/2); of a full layer only the first `partial_rotary_factor` of them."""
        rope = self.base["rope_parameters"][f"{kind}_attention"]
        pairs = int(rope.get("partial_rotary_factor", 1.0) * width // 2)
        frequency = rope["rope_theta"] ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
        frequency[pairs:] = 0
        # transformers keeps frequencies in float32.
        angle_T1F = torch.arange(len(x_THN))[:, None, None] * frequency.float().double()
        left, right = x_THN.split(width // 2, -1)
        cos, sin = torch.cos(angle_T1F), torch.sin(angle_T1F)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.base["rms_norm_eps"])
        return y if weight is None else y * weight

    def embedding(self, tokens: list[int]) -> Tensor:
        return self.weights["model.embed_tokens.weight"][tokens] * math.sqrt(self.base["hidden_size"])

    def logits(self, normed_TD: Tensor) -> Tensor:
        cap = self.base["final_logit_softcapping"]
        return cap * torch.tanh(normed_TD @ self.weights["model.embed_tokens.weight"].T / cap)

    def under(self, prefix: str) -> Weights:
        prefix = f"model.{prefix}"
        return {name[len(prefix) :]: t for name, t in self.weights.items() if name.startswith(prefix)}


def split(x_TC: Tensor, width: int) -> Tensor:
    return x_TC.unflatten(-1, (-1, width))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
