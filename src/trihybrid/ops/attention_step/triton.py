"""The kernels of `attention_step`: a sequence is split over several programs, whose parts are joined.

Scores are kept in base 2, as in `decode_attention.triton`. How many programs there are depends on shapes alone, how
many tokens each takes on the length, so that a CUDA graph can record it. There are two forms:

    few tokens    (`_head`) a program has one head, and whichever program of a head comes last joins its parts, as a
                  counter tells it: each head reads keys and values, mostly from the cache, and waits for nobody
    many tokens   (`_group`, `_join`) a program has all heads of a group, so that keys and values are read once; a
                  second kernel joins the parts

A program's first keys and values are fetched before the former kernel has ended: of all that it reads from the store, a
step writes the newest token's alone, and that one is read on its own.

Legend: R query heads of a group, rounded up to ROWS; S tokens of a block; N head width, rounded up to WIDE; C parts.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.attention_step import Heads, Store
from trihybrid.ops.attention_step.heads import (
    block_of,
    newest_of,
    normed,
    own_weights,
    part_of,
    place_of,
    placed,
    row,
)
from trihybrid.ops.early import admit_next, await_former, early

ROWS = 16  # the fewest that a matrix product takes
LEAST_RING, LEAST_PAGES = 32, 128  # tokens of a part
FEW_PARTS = 16  # up to which there are few tokens
PROGRAMS = 2  # of many tokens, for every processor, which holds no more of them
JOIN = (64, 64)  # parts at a time and channels of a program that joins


def head_sizes(wide: int) -> tuple[int, int]:
    """Tokens of a block and warps of a program, by the head width, where tokens are few."""
    return (64, 4) if wide <= 64 else {128: (64, 8), 256: (32, 8), 512: (16, 8)}[wide]


def group_sizes(wide: int) -> tuple[int, int]:
    """Likewise where they are many."""
    if wide <= 128:
        return 64, 4
    return (32, 8) if wide <= 256 else (16, 8)


def launch(
    x_BP: Tensor,
    heads: Heads,
    store: Store,
    table: tuple[Tensor, Tensor] | None,
    gate_BC: Tensor | None,
    o_BC: Tensor,
    arrived: Tensor,
) -> None:
    """As `attention_step`."""
    keys, values, table_BM = store.keys, store.values, store.table_BM
    batch, length, groups, width = len(x_BP), keys.shape[1], heads.groups, heads.width
    if table_BM is None:
        parts = triton.cdiv(length, LEAST_RING)
    else:
        parts = triton.cdiv(table_BM.shape[1] * length, LEAST_PAGES)
    few = parts <= FEW_PARTS
    if not few:
        processors = torch.cuda.get_device_properties(x_BP.device).multi_processor_count
        parts = max(1, min(parts, PROGRAMS * processors // (batch * groups)))
    sums = torch.empty(batch * heads.heads * parts * width, dtype=torch.float32, device=x_BP.device)
    norms = torch.empty(batch * heads.heads * parts * 2, dtype=torch.float32, device=x_BP.device)
    wide, soon = max(16, triton.next_power_of_2(width)), early(x_BP.device)
    q_first, k_first, v_first = heads.first
    # What is not there is never read; something has to stand in its place.
    cosine, sine = (x_BP, x_BP) if table is None else table
    pages = store.positions_B if table_BM is None else table_BM
    gate = x_BP if gate_BC is None else gate_BC
    q_gain, k_gain = heads.q_gain, heads.k_gain
    given = (
        x_BP, *(x_BP if gain is None else gain.weight for gain in (q_gain, k_gain)), cosine, sine, keys, values, pages,
        store.positions_B, sums, norms,
    )  # fmt: skip
    sizes = (
        x_BP.stride(0), q_first, k_first or 0, v_first or 0, *keys.stride()[:3], *values.stride()[:3],
        pages.stride(0), *(0.0 if gain is None else gain.epsilon for gain in (q_gain, k_gain)), heads.v_epsilon or 0.0,
        heads.scale * math.log2(math.e), parts, heads.heads // groups, groups, width,
    )  # fmt: skip
    forms = {
        "LENGTH": length, "RING": table_BM is None, "OWN": k_first is not None, "Q_NORMED": q_gain is not None,
        "K_NORMED": k_gain is not None, "V_NORMED": heads.v_epsilon is not None, "TURNED": table is not None,
        "WIDE": wide, "EARLY": soon,
    }  # fmt: skip
    if few:
        block, warps = head_sizes(wide)
        _head[(parts, batch * heads.heads)](
            *given, gate, o_BC, arrived, *sizes, gate.stride(0), o_BC.stride(0), **forms, GATED=gate_BC is not None,
            BLOCK=block, PARTS=triton.next_power_of_2(parts), num_warps=warps, num_stages=1, launch_pdl=soon,
        )  # fmt: skip
        return
    block, warps = group_sizes(wide)
    _group[(parts, batch * groups)](
        *given, *sizes, **forms, ROWS=ROWS, BLOCK=block, num_warps=warps, num_stages=1, launch_pdl=soon
    )
    _join[(batch * heads.heads, triton.cdiv(width, JOIN[1]))](
        sums, norms, gate, o_BC, gate.stride(0), o_BC.stride(0), parts, heads.heads // groups, heads.heads, width,
        GATED=gate_BC is not None, PARTS=JOIN[0], BLOCK=JOIN[1], EARLY=soon, num_warps=4, launch_pdl=soon,
    )  # fmt: skip


@triton.jit
def _head(
    x, q_weight, k_weight, cosine, sine, keys, values, table, positions, sums, norms, gate, o, arrived, x_b, q_first,
    k_first, v_first, keys_p, keys_l, keys_g, values_p, values_l, values_g, table_b, q_epsilon, k_epsilon, v_epsilon,
    scale, parts, repeats, groups, width, gate_b, o_b, LENGTH: tl.constexpr, RING: tl.constexpr, OWN: tl.constexpr,
    Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr, V_NORMED: tl.constexpr, TURNED: tl.constexpr, WIDE: tl.constexpr,
    EARLY: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part, lane = tl.program_id(0), tl.program_id(1)
    batch, head = (lane // (groups * repeats)).to(tl.int64), lane % (groups * repeats)
    group = head // repeats
    wide_1N, block_S = tl.arange(0, WIDE)[None, :], tl.arange(0, BLOCK)
    in_1N = wide_1N < width
    first, last, newest = part_of(positions, batch, part, parts, LENGTH, RING, BLOCK)
    table += batch * table_b
    token_S = first + block_S
    in_S = (token_S < last) & (token_S != newest)
    next_k_SN, next_v_SN = block_of(
        keys, values, table, batch, group, token_S, in_S, wide_1N, in_1N, keys_p, keys_l, keys_g, values_p, values_l,
        values_g, LENGTH, RING,
    )  # fmt: skip
    pairs = width // 2
    other_1N = tl.where(wide_1N < pairs, wide_1N + pairs, wide_1N - pairs)
    q_own_1N = own_weights(q_weight, wide_1N, other_1N, in_1N, Q_NORMED)
    k_own_1N = own_weights(k_weight, wide_1N, other_1N, in_1N, K_NORMED)
    admit_next(EARLY)
    await_former(EARLY)
    # All that is read comes before the first sum over channels, for which a program's threads wait for each other.
    x += batch * x_b
    head_11 = head * width
    x_1N = row(x + q_first + head_11, wide_1N, in_1N)
    x_other_1N, cosine_1N, sine_1N = x_1N, wide_1N, wide_1N
    if TURNED:
        x_other_1N = tl.load(x + q_first + head_11 + other_1N, mask=in_1N, other=0.0).to(tl.float32)
        cosine_1N = row(cosine + batch * width, wide_1N, in_1N)
        sine_1N = row(sine + batch * width, wide_1N, in_1N)
    at_k_1N = keys + place_of(table, batch, newest, keys_p, keys_l, LENGTH, RING) + group * keys_g + wide_1N
    at_v_1N = values + place_of(table, batch, newest, values_p, values_l, LENGTH, RING)
    at_v_1N += group * values_g + wide_1N
    k_1N, k_other_1N, v_1N = newest_of(
        x, k_first, v_first, group, width, at_k_1N, at_v_1N, wide_1N, other_1N, in_1N, OWN, TURNED
    )
    q_1N = placed(x_1N, x_other_1N, q_own_1N, cosine_1N, sine_1N, width, q_epsilon, Q_NORMED, TURNED)
    q_1N = q_1N.to(keys.dtype.element_ty).to(tl.float32) * scale
    most, total = float("-inf"), 0.0
    sum_1N = tl.zeros((1, WIDE), tl.float32)
    if part == 0:
        if OWN:
            k_1N = placed(k_1N, k_other_1N, k_own_1N, cosine_1N, sine_1N, width, k_epsilon, K_NORMED, TURNED)
            k_1N = k_1N.to(keys.dtype.element_ty).to(tl.float32)
            v_1N = normed(v_1N, width, v_epsilon, V_NORMED).to(values.dtype.element_ty).to(tl.float32)
            if head % repeats == 0:
                tl.store(at_k_1N, k_1N.to(keys.dtype.element_ty), mask=in_1N)
                tl.store(at_v_1N, v_1N.to(values.dtype.element_ty), mask=in_1N)
        most, total = tl.sum(tl.sum(q_1N * k_1N, 1), 0), 1.0
        sum_1N += v_1N
    for start in range(first, last, BLOCK):
        k_SN, v_SN, in_now_S = next_k_SN, next_v_SN, in_S
        token_S = start + BLOCK + block_S
        in_S = (token_S < last) & (token_S != newest)
        next_k_SN, next_v_SN = block_of(
            keys, values, table, batch, group, token_S, in_S, wide_1N, in_1N, keys_p, keys_l, keys_g, values_p,
            values_l, values_g, LENGTH, RING,
        )  # fmt: skip
        s_S = tl.where(in_now_S, tl.sum(k_SN.to(tl.float32) * q_1N, 1), float("-inf"))
        new = tl.maximum(most, tl.max(s_S, 0))
        # A block may hold nothing but the newest token's place.
        base = tl.where(new == float("-inf"), 0.0, new)
        old, p_S = tl.exp2(most - base), tl.exp2(s_S - base)
        total = total * old + tl.sum(p_S, 0)
        sum_1N = sum_1N * old + tl.sum(p_S[:, None] * v_SN.to(tl.float32), 0)[None, :]
        most = new
    at = lane.to(tl.int64) * parts + part
    tl.store(sums + at * width + wide_1N, sum_1N, mask=in_1N)
    tl.store(norms + at * 2, most)
    tl.store(norms + at * 2 + 1, total)
    # All of this program's writes are there before it is counted, and those of all others where it is the last.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + lane, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if before == parts - 1:
        tl.store(arrived + lane, 0)
        part_C1 = tl.arange(0, PARTS)[:, None]
        in_C1, from_C1 = part_C1 < parts, lane.to(tl.int64) * parts + part_C1
        most_C1 = tl.load(norms + from_C1 * 2, mask=in_C1, other=float("-inf"), cache_modifier=".cg")
        total_C1 = tl.load(norms + from_C1 * 2 + 1, mask=in_C1, other=0.0, cache_modifier=".cg")
        sum_CN = tl.load(
            sums + from_C1 * width + wide_1N, mask=in_C1 & in_1N, other=0.0, cache_modifier=".cg"
        )
        # The first part always has a token, so the largest is a number.
        weight_C1 = tl.exp2(most_C1 - tl.max(most_C1, 0)[None, :])
        o_1N = (tl.sum(weight_C1 * sum_CN, 0) / tl.sum(weight_C1 * total_C1, 0))[None, :]
        if GATED:
            o_1N *= row(gate + batch * gate_b + head * width, wide_1N, in_1N)
        tl.store(o + batch * o_b + head * width + wide_1N, o_1N.to(o.dtype.element_ty), mask=in_1N)


@triton.jit
def _group(
    x, q_weight, k_weight, cosine, sine, keys, values, table, positions, sums, norms, x_b, q_first, k_first, v_first,
    keys_p, keys_l, keys_g, values_p, values_l, values_g, table_b, q_epsilon, k_epsilon, v_epsilon, scale, parts,
    repeats, groups, width, LENGTH: tl.constexpr, RING: tl.constexpr, OWN: tl.constexpr, Q_NORMED: tl.constexpr,
    K_NORMED: tl.constexpr, V_NORMED: tl.constexpr, TURNED: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, lane = tl.program_id(0), tl.program_id(1)
    batch, group = (lane // groups).to(tl.int64), lane % groups
    row_R, wide_1N, block_S = tl.arange(0, ROWS), tl.arange(0, WIDE)[None, :], tl.arange(0, BLOCK)
    in_R, in_1N = row_R < repeats, wide_1N < width
    in_RN = in_R[:, None] & in_1N
    first, last, newest = part_of(positions, batch, part, parts, LENGTH, RING, BLOCK)
    table += batch * table_b
    token_S = first + block_S
    in_S = (token_S < last) & (token_S != newest)
    next_k_SN, next_v_SN = block_of(
        keys, values, table, batch, group, token_S, in_S, wide_1N, in_1N, keys_p, keys_l, keys_g, values_p, values_l,
        values_g, LENGTH, RING,
    )  # fmt: skip
    pairs = width // 2
    other_1N = tl.where(wide_1N < pairs, wide_1N + pairs, wide_1N - pairs)
    q_own_1N = own_weights(q_weight, wide_1N, other_1N, in_1N, Q_NORMED)
    k_own_1N = own_weights(k_weight, wide_1N, other_1N, in_1N, K_NORMED)
    admit_next(EARLY)
    await_former(EARLY)
    # All that is read comes before the first sum over channels, for which a program's threads wait for each other.
    x += batch * x_b
    head_R1 = (group * repeats + row_R)[:, None] * width
    x_RN = tl.load(x + q_first + head_R1 + wide_1N, mask=in_RN, other=0.0).to(tl.float32)
    x_other_RN, cosine_1N, sine_1N = x_RN, wide_1N, wide_1N
    if TURNED:
        x_other_RN = tl.load(x + q_first + head_R1 + other_1N, mask=in_RN, other=0.0).to(tl.float32)
        cosine_1N = row(cosine + batch * width, wide_1N, in_1N)
        sine_1N = row(sine + batch * width, wide_1N, in_1N)
    at_k_1N = keys + place_of(table, batch, newest, keys_p, keys_l, LENGTH, RING) + group * keys_g + wide_1N
    at_v_1N = values + place_of(table, batch, newest, values_p, values_l, LENGTH, RING)
    at_v_1N += group * values_g + wide_1N
    k_1N, k_other_1N, v_1N = newest_of(
        x, k_first, v_first, group, width, at_k_1N, at_v_1N, wide_1N, other_1N, in_1N, OWN, TURNED
    )
    q_RN = placed(x_RN, x_other_RN, q_own_1N, cosine_1N, sine_1N, width, q_epsilon, Q_NORMED, TURNED)
    q_RN = q_RN.to(keys.dtype.element_ty)
    most_R = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    sum_RN = tl.zeros((ROWS, WIDE), tl.float32)
    if part == 0:
        if OWN:
            k_1N = placed(k_1N, k_other_1N, k_own_1N, cosine_1N, sine_1N, width, k_epsilon, K_NORMED, TURNED)
            k_1N = k_1N.to(keys.dtype.element_ty).to(tl.float32)
            v_1N = normed(v_1N, width, v_epsilon, V_NORMED).to(values.dtype.element_ty).to(tl.float32)
            tl.store(at_k_1N, k_1N.to(keys.dtype.element_ty), mask=in_1N)
            tl.store(at_v_1N, v_1N.to(values.dtype.element_ty), mask=in_1N)
        most_R = tl.sum(q_RN.to(tl.float32) * k_1N, 1) * scale
        sum_R += 1
        sum_RN += v_1N
    for start in range(first, last, BLOCK):
        k_SN, v_SN, in_now_S = next_k_SN, next_v_SN, in_S
        token_S = start + BLOCK + block_S
        in_S = (token_S < last) & (token_S != newest)
        next_k_SN, next_v_SN = block_of(
            keys, values, table, batch, group, token_S, in_S, wide_1N, in_1N, keys_p, keys_l, keys_g, values_p,
            values_l, values_g, LENGTH, RING,
        )  # fmt: skip
        s_RS = tl.dot(q_RN, tl.trans(k_SN), input_precision="ieee") * scale
        s_RS = tl.where(in_now_S[None, :], s_RS, float("-inf"))
        new_R = tl.maximum(most_R, tl.max(s_RS, 1))
        # A block may hold nothing but the newest token's place.
        base_R = tl.where(new_R == float("-inf"), 0.0, new_R)
        old_R = tl.exp2(most_R - base_R)
        p_RS = tl.exp2(s_RS - base_R[:, None])
        sum_R = sum_R * old_R + tl.sum(p_RS, 1)
        sum_RN = sum_RN * old_R[:, None] + tl.dot(p_RS.to(v_SN.dtype), v_SN, input_precision="ieee")
        most_R = new_R
    at_R = (lane.to(tl.int64) * parts + part) * repeats + row_R
    tl.store(sums + at_R[:, None] * width + wide_1N, sum_RN, mask=in_RN)
    tl.store(norms + at_R * 2, most_R, mask=in_R)
    tl.store(norms + at_R * 2 + 1, sum_R, mask=in_R)


@triton.jit
def _join(
    sums, norms, gate, o, gate_b, o_b, parts, repeats, heads, width,
    GATED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    lane, row = batch * (heads // repeats) + head // repeats, head % repeats
    wide_N, part_C = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PARTS)
    in_N = wide_N < width
    admit_next(EARLY)
    await_former(EARLY)
    highest = float("-inf")
    total = 0.0
    total_N = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, PARTS):
        at_C = (lane * parts + start + part_C) * repeats + row
        in_C = start + part_C < parts
        most_C = tl.load(norms + at_C * 2, mask=in_C, other=float("-inf"))
        sum_C = tl.load(norms + at_C * 2 + 1, mask=in_C, other=0.0)
        sum_CN = tl.load(
            sums + at_C[:, None] * width + wide_N[None, :], mask=in_C[:, None] & in_N[None, :], other=0.0
        )
        # The first part always has a token, so the largest is a number.
        higher = tl.maximum(highest, tl.max(most_C, 0))
        weight_C = tl.exp2(most_C - higher)
        old = tl.exp2(highest - higher)
        total = total * old + tl.sum(weight_C * sum_C, 0)
        total_N = total_N * old + tl.sum(weight_C[:, None] * sum_CN, 0)
        highest = higher
    o_N = total_N / total
    at_N = head * width + wide_N
    if GATED:
        o_N *= tl.load(gate + batch * gate_b + at_N, mask=in_N, other=0.0).to(tl.float32)
    tl.store(o + batch * o_b + at_N, o_N.to(o.dtype.element_ty), mask=in_N)
