"""A direct reading of the published time-mix of the hxa07 family: token by token and head by head, in float64, from
tensors under their published names. It shares no code with the package.

Sources: OpenMOSE/RWKVInside (hxa079 to hxa07C) and the llama.cpp graphs of hxa07D, hxa07E and hxa07i.

Legend: T tokens, D model width, N head width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_LOG_DECAY = ("hxa079", "hxa07a", "hxa07b")
VALUE_FIRST = ("hxa079", "hxa07d", "hxa07e")
KEY_FIRST = ("hxa079", "hxa07d")
BONUS = ("hxa079", "hxa07d")
VALUE_LORA = {"hxa07b": (0.2, "v"), "hxa07c": (0.2, "v"), "hxa07e": (0.5, "dv")}


@dataclass(frozen=True)
class Sizes:
    """What the equations need beside the tensors. `theta` None means no positions."""

    heads: int
    kv_heads: int
    width: int
    theta: float | None = None
    epsilon: float = 1e-6


def time_mix(
    revision: str, p: dict[str, Tensor], x_TD: Tensor, sizes: Sizes, first: list | None = None
) -> tuple[Tensor, Tensor, list]:
    """Outputs [T, D], states [heads, N, N] (keys by values) and, token by token, the (v, k) of all key/value heads.

    `first` is the list that the first such layer returned, for layers after it that mix it in.
    """
    p = {name: tensor.double().squeeze() for name, tensor in p.items()}
    width, repeats = sizes.width, sizes.heads // sizes.kv_heads
    states = [torch.zeros(width, width, dtype=torch.float64) for _ in range(sizes.heads)]
    outputs, pairs = [], []
    for t, x in enumerate(x_TD.double()):
        r = [
            turned(normed(head, p.get("r_norm.weight"), sizes), t, sizes)
            for head in linear(p, "receptance", x).split(width)
        ]
        k = [
            turned(normed(head, p.get("k_norm.weight"), sizes), t, sizes)
            for head in linear(p, "key", x).split(width)
        ]
        k, v = torch.cat(k), linear(p, "value", x)
        if first is not None and revision in VALUE_FIRST:
            v = v + (first[t][0] - v) * sigmoid(p["v0"] + (x @ p["v1"]) @ p["v2"])
        if first is not None and revision in KEY_FIRST:
            k = k + (first[t][1] - k) * sigmoid(p["k0"] + (x @ p["k1"]) @ p["k2"])
        pairs.append((v, k))
        z = torch.cat(r) if revision == "hxa07e" else x
        u = p["w0"] + torch.tanh(z @ p["w1"]) @ p["w2"]
        a = sigmoid(p["a0"] + (z @ p["a1"]) @ p["a2"])
        g = sigmoid(z @ p["g1"]) @ p["g2"]
        l = -torch.log1p(torch.exp(-u)) - 0.5  # noqa: E741
        w = torch.exp(-torch.exp(l))
        extra = torch.zeros_like(u)
        if revision in VALUE_LORA:
            factor, name = VALUE_LORA[revision]
            extra = factor * ((x @ p[f"{name}1"]) @ p[f"{name}2"])
        reads = []
        for h in range(sizes.heads):
            own = slice(h * width, (h + 1) * width)
            group = slice(h // repeats * width, (h // repeats + 1) * width)
            k_h, v_h = k[group], v[group] + extra[own]
            kk = k_h / (torch.sqrt((k_h * k_h).sum()) + 1e-12)
            omega = l[own] if revision in LOG_LOG_DECAY else w[own]
            k_h = k_h * (1 - omega + a[own])
            before = states[h]
            states[h] = (
                w[own][:, None] * before + torch.outer(kk * a[own], -kk @ before) + torch.outer(k_h, v_h)
            )
            o = states[h].T @ r[h] / math.sqrt(width)
            if revision in BONUS:
                o = o + (r[h] * k_h * p["r_k"].view(sizes.heads, width)[h]).sum() * v_h
            reads.append(o)
        outputs.append(linear(p, "output", torch.cat(reads) * g))
    return torch.stack(outputs), torch.stack(states), pairs


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def normed(head: Tensor, weight: Tensor | None, sizes: Sizes) -> Tensor:
    return head if weight is None else head / torch.sqrt((head * head).mean() + sizes.epsilon) * weight


def turned(head: Tensor, t: int, sizes: Sizes) -> Tensor:
    if sizes.theta is None:
        return head
    half = sizes.width // 2
    angle = t * sizes.theta ** (-2 * torch.arange(half, dtype=torch.float64) / sizes.width)
    left, right = head[:half], head[half:]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat([left * cos - right * sin, right * cos + left * sin])


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))
