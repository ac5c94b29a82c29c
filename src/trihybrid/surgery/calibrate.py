"""What scales are fitted on: what a teacher's global layers see and say, on text or on noise.

On text the teacher runs over calibration tokens, one layer in memory at a time. On noise nothing runs: a layer's input
is what its first norm makes of any direction, x = gain * u with |u|^2 = D, and its output what the attention says of a
token alone, W_o v. The norm behind the slot takes any factor between the two out again (docs/gemma4.md).

Legend: B batch, T time, N = B T, D model width, G key/value heads, W channels of a head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from trihybrid.surgery.inherit import Heads
from trihybrid.surgery.weights import LayerWeights

NOISE_TOKENS = 64


@dataclass
class LayerRecord:
    """Inputs x (after the layer's first norm) and outputs y (before its post-norm) of one attention, each a list of
    [B, T, D] blocks."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class _Seen(Exception):
    """The last layer that is asked for has run."""


@torch.no_grad()
def record_layers(
    model: PreTrainedModel, tokens: Iterable[tuple[Tensor, Tensor]], layers: Iterable[int]
) -> dict[int, LayerRecord]:
    """Run a teacher's model, without its head, over blocks of (input_ids, position_ids), both [B, T], and record the
    attentions of `layers`.

    Nothing above the last of them runs. Each block is one pass over the weights, whatever its size.
    """
    records = {index: LayerRecord([], []) for index in layers}

    def keep(index: int) -> "torch.utils.hooks.RemovableHandle":
        def hook(
            module: nn.Module, arguments: tuple, options: dict[str, Any], output: tuple[Tensor, Tensor | None]
        ) -> None:
            records[index].inputs.append(options["hidden_states"])
            records[index].outputs.append(output[0])
            if index == max(records):
                raise _Seen

        return model.layers[index].self_attn.register_forward_hook(hook, with_kwargs=True)

    handles = [keep(index) for index in records]
    training = model.training
    model.eval()
    try:
        for input_ids, position_ids in tokens:
            try:
                model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
            except _Seen:
                continue
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return records


def noise(width: int, seed: int, like: Tensor) -> Tensor:
    """Directions without preference, u [1, T, D], each of rms one: what a norm makes of its input before its gain."""
    generator = torch.Generator().manual_seed(seed)
    u_1TD = torch.randn(1, NOISE_TOKENS, width, generator=generator)
    u_1TD = u_1TD * u_1TD.pow(2).mean(-1, keepdim=True).rsqrt()
    return u_1TD.to(like.device, like.dtype)


def noise_record(
    u_1TD: Tensor, layer: LayerWeights, heads: Heads, value_norm: bool, epsilon: float
) -> LayerRecord:
    """What an attention would see and say of noise, each token for itself.

    Args:
        u_1TD: see `noise`.
        layer: its weights.
        heads: of the teacher.
        value_norm: whether the attention brings each head of values to rms one.
        epsilon: of that norm.
    """
    x_1TD = u_1TD * layer.input_gain
    assert layer.attention.value is not None
    v_1TGW = linear(x_1TD, layer.attention.value, layer.attention.value_bias).unflatten(
        -1, (heads.groups, heads.width)
    )
    if value_norm:
        v_1TGW = v_1TGW * (v_1TGW.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt()
    read = v_1TGW.repeat_interleave(heads.query // heads.groups, 2).flatten(-2)
    return LayerRecord([x_1TD], [linear(read, layer.attention.output, layer.attention.output_bias)])


def rows(blocks: list[Tensor]) -> Tensor:
    """All tokens of blocks [B, T, D], which may differ in length, as rows [N, D]."""
    return torch.cat([block.flatten(0, 1) for block in blocks])
