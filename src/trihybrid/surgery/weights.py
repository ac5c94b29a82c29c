"""A teacher's attention by what its tensors do, whatever its family leaves out, and read from wherever they lie.

Legend: C model width, H query heads, G key/value heads, D channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trihybrid.models.anatomy import Anatomy
from trihybrid.models.teacher.source import TensorSource


@dataclass(frozen=True)
class AttentionWeights:
    """The tensors of one attention; None for those that it has not.

    Attributes:
        query: [H D, C], with its bias [H D].
        key, value: [G D, C], with their biases [G D]. A layer that reads another's has neither; where keys are values,
            both are the same tensor.
        output: [C, H D], with its bias [C].
        query_gain, key_gain: [D] what a head's normed channels are multiplied with, the sum where a family stores it
            less one.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    output: Tensor
    query_gain: Tensor | None
    key_gain: Tensor | None
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    output_bias: Tensor | None


def attention_weights(find: Callable[[str], Tensor | None], body: Anatomy) -> AttentionWeights:
    """The weights of one attention of a teacher with this anatomy; `find` gives the tensor of a name inside it, as
    `q_proj.weight`, or None."""
    query, output = find("q_proj.weight"), find("o_proj.weight")
    assert query is not None and output is not None
    key, key_bias = find("k_proj.weight"), find("k_proj.bias")
    value, value_bias = find("v_proj.weight"), find("v_proj.bias")
    if value is None:
        value, value_bias = key, key_bias

    def gain(name: str) -> Tensor | None:
        weight = find(f"{name}.weight")
        return weight if weight is None or body.norm == "weight" else 1 + weight.float()

    return AttentionWeights(
        query=query,
        key=key,
        value=value,
        output=output,
        query_gain=gain("q_norm"),
        key_gain=gain("k_norm"),
        query_bias=find("q_proj.bias"),
        key_bias=key_bias,
        value_bias=value_bias,
        output_bias=find("o_proj.bias"),
    )


@dataclass(frozen=True)
class LayerWeights:
    """What a slot is made from.

    Attributes:
        attention: the layer's, with keys and values of the layer that owns those which it reads.
        input_gain: [C] what the normed stream is multiplied with before it.
        names: what the tensors of the attention are called in the teacher.
    """

    attention: AttentionWeights
    input_gain: Tensor
    names: frozenset[str]


def read_layer(
    source: TensorSource, empty: PreTrainedModel, body: Anatomy, index: int, dtype: torch.dtype
) -> LayerWeights:
    """Read what the slot of a layer is made from, in `dtype`. Only what the teacher's model has is read, never what a
    file may hold beside it, as keys and values of layers that share them.

    Args:
        source: the teacher's tensors.
        empty: its model without tensors, which says what there must be.

    Raises:
        ValueError: a tensor is missing.
    """
    there = set(source.names)

    def read(name: str) -> Tensor:
        if name not in there:
            raise ValueError(f"the teacher has no tensor {name}; fetch its folder again")
        return source.read(name).to(dtype)

    places = {
        part: f"model.layers.{layer}.self_attn.{part}"
        for layer in (index, body.owners[index])
        for part in empty.model.layers[layer].self_attn.state_dict()
        if layer == index or part.startswith(("k_", "v_"))
    }
    found = {part: read(name) for part, name in places.items()}
    gain = read(f"model.layers.{index}.input_layernorm.weight")
    return LayerWeights(
        attention_weights(found.get, body),
        1 + gain if body.norm == "one_plus_weight" else gain,
        frozenset(places.values()),
    )
