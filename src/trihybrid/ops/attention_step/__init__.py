"""Attention in a decoding step from raw projections on, as one launch, or two over many tokens.

    q, k <- rotate(norm(q, k));  v <- norm(v);  the store gets k and v of the newest token
    o_h = (sum_s softmax_s(scale q_h . k_s) v_s) gate       over all stored tokens of the sequence

A store is a ring, one line of W places a sequence, where token t lies at place t mod W; or pages, where it lies in page
table[b, t // L] at place t % L. The kernel of `triton` splits a sequence over many programs; one of them has the newest
token from its projections, the others leave its place out, so that nobody waits for the store. Where the kernel does
not fit, these are torch's operators around `ops.decode_attention`.

Legend: B sequences, H query heads, G key/value heads, N head width, P columns of the projections, L places of a page or
line, M pages of a sequence.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trihybrid.ops.decode_attention import decode_attention, paged_attention
from trihybrid.ops.decode_product import Gain

__all__ = ["MOST_REPEATS", "WIDEST", "Heads", "Store", "attention_step", "fits"]

WIDEST = 512
MOST_REPEATS = 16


@dataclass(frozen=True)
class Heads:
    """What stays the same from step to step.

    Attributes:
        heads, groups, width: H, G, N; at most MOST_REPEATS heads a group, at most WIDEST wide.
        scale: factor on the scores.
        first: columns of the projections where queries, keys and values begin; without keys and values of its own a
            layer reads what another one has put into the store.
        q_gain, k_gain: norms [N] with weights, or None; k's only where there are keys.
        v_epsilon: of the values' norm, which has no weight; None for none.
    """

    heads: int
    groups: int
    width: int
    scale: float
    first: tuple[int, int | None, int | None]
    q_gain: Gain | None = None
    k_gain: Gain | None = None
    v_epsilon: float | None = None


@dataclass(frozen=True)
class Store:
    """Where keys and values of a step lie.

    Attributes:
        keys, values: [B, W, G, N] of a ring, [pages, L, G, N].
        positions_B: int64, how many tokens each sequence has seen.
        table_BM: int64, its pages; entries behind its length name any page. None for a ring.
    """

    keys: Tensor
    values: Tensor
    positions_B: Tensor
    table_BM: Tensor | None


def fits(x_BP: Tensor, heads: Heads) -> bool:
    """Whether the kernel takes these: a GPU, half precision, heads within WIDEST and MOST_REPEATS."""
    half = x_BP.dtype in (torch.bfloat16, torch.float16)
    return x_BP.is_cuda and half and heads.width <= WIDEST and heads.heads <= MOST_REPEATS * heads.groups


def attention_step(
    x_BP: Tensor,
    heads: Heads,
    store: Store,
    table: tuple[Tensor, Tensor] | None,
    gate_BC: Tensor | None,
    o_BC: Tensor,
    arrived: Tensor,
) -> None:
    """Put the newest token into the store and write what is read to o_BC, C = H N.

    Args:
        x_BP: rows of projections, dense in P.
        table: cosines, and sines with those of a head's first half negated, dense [B, N]; None for no rotation.
        gate_BC: factor of the output, dense in C; None for one.
        o_BC: dense in C.
        arrived: int32 zeros, at least B H; zeros again behind the step.
    """
    if fits(x_BP, heads):
        from trihybrid.ops.attention_step.triton import launch

        launch(x_BP, heads, store, table, gate_BC, o_BC, arrived)
        return
    q_BHN = _placed(_columns(x_BP, heads.first[0], heads.heads, heads), heads.q_gain, table)
    positions_B, length = store.positions_B, store.keys.shape[1]
    line_B = torch.arange(len(x_BP), device=x_BP.device)
    page_B = line_B if store.table_BM is None else store.table_BM[line_B, positions_B // length]
    if heads.first[1] is not None and heads.first[2] is not None:
        k_BGN = _placed(_columns(x_BP, heads.first[1], heads.groups, heads), heads.k_gain, table)
        v_BGN = _columns(x_BP, heads.first[2], heads.groups, heads)
        if heads.v_epsilon is not None:
            v_BGN = Gain(None, heads.v_epsilon)(v_BGN)
        store.keys[page_B, positions_B % length] = k_BGN
        store.values[page_B, positions_B % length] = v_BGN
    q_BHN = q_BHN.contiguous()
    if store.table_BM is None:
        lengths_B = (positions_B + 1).clamp(max=length)
        o_BHN = decode_attention(q_BHN, store.keys, store.values, lengths_B, heads.scale)
    else:
        o_BHN = paged_attention(q_BHN, store.keys, store.values, store.table_BM, positions_B + 1, heads.scale)
    o_BC.copy_(o_BHN.flatten(1) if gate_BC is None else o_BHN.flatten(1) * gate_BC)


def _columns(x_BP: Tensor, first: int, count: int, heads: Heads) -> Tensor:
    return x_BP[:, first : first + count * heads.width].unflatten(-1, (count, heads.width))


def _placed(x_BHN: Tensor, gain: Gain | None, table: tuple[Tensor, Tensor] | None) -> Tensor:
    if gain is not None:
        x_BHN = gain(x_BHN)
    if table is None:
        return x_BHN
    cosine_B1N, sine_B1N = (part[:, None] for part in table)
    turned_BHN = x_BHN * cosine_B1N + x_BHN.roll(x_BHN.shape[-1] // 2, -1) * sine_B1N
    return turned_BHN.to(x_BHN.dtype)
