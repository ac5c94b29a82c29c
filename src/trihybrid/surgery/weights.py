"""A teacher's attention by what its tensors do, whatever its family leaves out.

Legend: C model width, H query heads, G key/value heads, D channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trihybrid.models.anatomy import Anatomy


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
