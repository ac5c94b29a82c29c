"""What a mixer takes over from a teacher's attention: projections head by head, biases, norms, and the scale of values.

Legend: N tokens, C model width.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from trihybrid.mixers.contract import Projection, copy_into
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica
from trihybrid.models.anatomy import Anatomy
from trihybrid.surgery.inherit import Heads, fold_norm, ridge_regression, rms
from trihybrid.surgery.weights import AttentionWeights

PROJECTIONS = ("receptance", "key", "value", "output")
RWKV7_INHERITED = (
    *(f"{name}.{part}" for name in PROJECTIONS for part in ("weight", "bias")),
    "r_norm.weight",
    "k_norm.weight",
)
TICA_INHERITED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def inherit_rwkv7(
    mixer: Rwkv7, attention: AttentionWeights, body: Anatomy, heads: Heads, x_NC: Tensor
) -> None:
    """Receptance, key, value and output from an attention's projections, head by head (see `Heads`); `x_NC` is what it
    sees."""
    query, query_bias, gain = attention.query, attention.query_bias, attention.query_gain
    _fill(mixer.receptance, query, query_bias, gain, heads.query_rows(), heads.query)
    scale = _scale(query, query_bias, gain, x_NC) * body.score_scale
    copy_into(mixer.r_norm.weight, torch.full_like(mixer.r_norm.weight, scale))
    copy_into(mixer.output.weight, attention.output[:, heads.query_rows(ordered=False)])
    if attention.output_bias is not None:
        copy_into(mixer.output.bias, attention.output_bias)
    if mixer.donor is not None:
        return
    key, value, value_bias = attention.key, attention.value, attention.value_bias
    assert key is not None and value is not None
    _fill(mixer.key, key, attention.key_bias, attention.key_gain, heads.key_rows(), heads.groups)
    scale = _scale(key, attention.key_bias, attention.key_gain, x_NC)
    copy_into(mixer.k_norm.weight, torch.full_like(mixer.k_norm.weight, scale))
    if body.value_norm:
        # The teacher norms its values (rms 1 a token); the student has no such norm: its projection carries the scale.
        size = max(rms(linear(x_NC, value, value_bias)), 1e-12)
        value, value_bias = value / size, None if value_bias is None else value_bias / size
    _fill(mixer.value, value, value_bias, None, heads.key_rows(ordered=False), heads.groups)


def _fill(
    projection: Projection,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    rows: Tensor,
    heads: int,
) -> None:
    """Copy `rows` of a teacher's projection and of its bias, with the gain of the norm behind it folded in."""
    for parameter, tensor in ((projection.weight, weight), (projection.bias, bias)):
        if tensor is not None:
            folded = tensor if gain is None else fold_norm(tensor, gain, heads)[0]
            copy_into(parameter, folded[rows])


def _scale(weight: Tensor, bias: Tensor | None, gain: Tensor | None, x_NC: Tensor) -> float:
    """Size of what a teacher's projection says to its attention: the rms of its norm's gain, or where it has no norm of
    its outputs."""
    return rms(linear(x_NC, weight, bias) if gain is None else gain)


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
    assert attention.query_gain is not None and attention.key_gain is not None
    assert attention.key is not None and attention.value is not None
    query, _ = fold_norm(attention.query, attention.query_gain, heads.query)
    key, _ = fold_norm(attention.key, attention.key_gain, heads.groups)
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
    attention: AttentionWeights, x_NC: Tensor, donor_NC: Tensor, penalty: float
) -> AttentionWeights:
    """The attention with keys and values that, of its own inputs `x_NC`, come near those that their owner makes of the
    owner's inputs `donor_NC`: by ridge regression on the same tokens."""
    assert attention.key is not None and attention.value is not None
    both = torch.cat([attention.key, attention.value])
    joint = ridge_regression(x_NC, donor_NC @ both.T, penalty).to(both.dtype)
    key, value = joint.split(len(attention.key))
    return replace(attention, key=key, value=value)
