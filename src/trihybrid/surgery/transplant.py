"""What a mixer takes over from a wide attention: projections head by head, norms, and the scale of values.

Legend: B batch, T time, D model width, Q query heads, G key/value heads, W channels of a head.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trihybrid.mixers.contract import copy_into
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica
from trihybrid.surgery.calibrate import LayerRecord
from trihybrid.surgery.inherit import Heads, fold_norm, ridge_regression, rms

RWKV7_INHERITED = (
    "receptance.weight",
    "r_norm.weight",
    "key.weight",
    "k_norm.weight",
    "value.weight",
    "output.weight",
)
TICA_INHERITED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


@dataclass(frozen=True)
class AttentionWeights:
    """Tensors of an attention; key, value and key norm are those of the layer that owns them.

    Attributes:
        owner: index of the layer whose keys and values it reads; its own where it has some.
        gain_D: weight of the norm before the attention.
        query: [Q W, D], with its norm's weight [W].
        key: [G W, D], with its norm's weight [W].
        value: [G W, D]; of teachers whose values are their keys, the key projection.
        output: [D, Q W].
        names: what these tensors are called in the teacher, without the gain.
    """

    owner: int
    gain_D: Tensor
    query: Tensor
    query_norm: Tensor
    key: Tensor
    key_norm: Tensor
    value: Tensor
    output: Tensor
    names: frozenset[str]


def inherit_rwkv7(mixer: Rwkv7, attention: AttentionWeights, heads: Heads, record: LayerRecord) -> None:
    """Receptance, key, value and output from a wide attention's projections, head by head (see `Heads`)."""
    query, scale = fold_norm(attention.query, attention.query_norm, heads.query)
    copy_into(mixer.receptance.weight, query[heads.query_rows()])
    copy_into(mixer.r_norm.weight, torch.full_like(mixer.r_norm.weight, scale))
    copy_into(mixer.output.weight, attention.output[:, heads.query_rows(ordered=False)])
    if mixer.donor is not None:
        return
    key, scale = fold_norm(attention.key, attention.key_norm, heads.groups)
    copy_into(mixer.key.weight, key[heads.key_rows()])
    copy_into(mixer.k_norm.weight, torch.full_like(mixer.k_norm.weight, scale))
    # The teacher norms its values (rms 1 a token); the student has no such norm, so its projection carries the scale.
    value = attention.value / max(rms(torch.cat(record.inputs) @ attention.value.T), 1e-12)
    copy_into(mixer.value.weight, value[heads.key_rows(ordered=False)])


def inherit_tica(mixer: Tica, attention: AttentionWeights, heads: Heads) -> None:
    """Queries, keys and values from blocks of the teacher's heads without rotary channels, which match by content as
    TICA does; spread evenly over the teacher's heads.

    Raises:
        ValueError: too few such channels.
    """
    options = mixer.options
    order = torch.arange(heads.width)
    half = heads.width // 2
    content = torch.cat([order[heads.rotary_pairs : half], order[half + heads.rotary_pairs :]])
    if len(content) < options.head_dim:
        raise ValueError(
            f'surgery.tica.start is "inherited": {len(content)} channels a head of the teacher have no rotary '
            f"position, tica.head_dim is {options.head_dim}; lower it, or start fresh"
        )
    query, _ = fold_norm(attention.query, attention.query_norm, heads.query)
    key, _ = fold_norm(attention.key, attention.key_norm, heads.groups)
    places = len(content) // options.head_dim
    per_key, repeats = options.heads // options.kv_heads, heads.query // heads.groups

    def rows(head: int, place: int) -> Tensor:
        return head * heads.width + content[place * options.head_dim : (place + 1) * options.head_dim]

    for group in range(options.kv_heads):
        lent, place = group % heads.groups, (group // heads.groups) % places
        target = slice(group * options.head_dim, (group + 1) * options.head_dim)
        if mixer.donor is None:
            copy_into(mixer.k_proj.weight[target], key[rows(lent, place)])
            copy_into(mixer.v_proj.weight[target], attention.value[rows(lent, place)])
        for member in range(per_key):
            head = lent * repeats + (group * per_key + member) % repeats
            first = (group * per_key + member) * options.head_dim
            copy_into(mixer.q_proj.weight[first : first + options.head_dim], query[rows(head, place)])


def fit_keys_values(
    attention: AttentionWeights, record: LayerRecord, owner: LayerRecord, penalty: float
) -> AttentionWeights:
    """The attention with keys and values that, of its own inputs, come near those that its owner makes of the owner's
    inputs: by ridge regression on the tokens of both records."""
    x_TD, donor_TD = (torch.cat(seen.inputs).flatten(0, 1) for seen in (record, owner))
    both = torch.cat([attention.key, attention.value])
    joint = ridge_regression(x_TD, donor_TD @ both.T, penalty).to(both.dtype)
    key, value = joint.split(len(attention.key))
    return replace(attention, key=key, value=value)
