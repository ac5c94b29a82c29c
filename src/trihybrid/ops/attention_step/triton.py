"""The kernels of `attention_step`: a sequence is split over several programs, whose parts are joined.

Scores are kept in base 2, as in `decode_attention.triton`. How many programs there are depends on shapes alone, how
many tokens each takes on the length, so that a CUDA graph can record it. Where they are few, the heads of a group are
split over them too, and whichever program of a lane comes last joins the parts, as a counter tells it. Many parts are
joined by a second kernel, since one program would take too long.

A program's first keys and values are fetched before the former kernel has ended: of all that it reads from the store, a
step writes the newest token's alone, and that one is read on its own.

Legend: R query heads of a lane (a group, or a share of it), rounded up to ROWS; S tokens of a block; N head width,
rounded up to WIDE; C parts.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trihybrid.ops.attention_step import Heads, Store
from trihybrid.ops.early import admit_next, await_former, early

ROWS = 16  # the fewest that a matrix product takes
LEAST_RING, LEAST_PAGES = 32, 128  # tokens of a part
PROGRAMS = 2  # for every processor, which holds no more of them
FEW_PARTS = 16  # that the last program joins
SPLITS = 4  # of a group's heads, where parts are few
JOINED = 8192  # numbers that it holds at a time
JOIN = (64, 64)  # parts at a time and channels of a program of the second kernel


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
    processors = torch.cuda.get_device_properties(x_BP.device).multi_processor_count
    most = (
        triton.cdiv(length, LEAST_RING)
        if table_BM is None
        else triton.cdiv(table_BM.shape[1] * length, LEAST_PAGES)
    )
    parts = max(1, min(most, PROGRAMS * processors // (batch * groups)))
    repeats = heads.heads // groups
    splits = math.gcd(repeats, SPLITS) if parts <= FEW_PARTS else 1
    repeats //= splits
    lanes = batch * groups * splits
    sums = torch.empty(lanes * parts * repeats * width, dtype=torch.float32, device=x_BP.device)
    norms = torch.empty(lanes * parts * repeats * 2, dtype=torch.float32, device=x_BP.device)
    wide, soon = max(16, triton.next_power_of_2(width)), early(x_BP.device)
    own, (block, warps) = triton.next_power_of_2(repeats), sizes(wide)
    joined = max(1, min(triton.next_power_of_2(parts), JOINED // (own * wide)))
    q_first, k_first, v_first = heads.first
    # What is not there is never read; something has to stand in its place.
    cosine, sine = (x_BP, x_BP) if table is None else table
    pages = store.positions_B if table_BM is None else table_BM
    gate = x_BP if gate_BC is None else gate_BC
    q_gain, k_gain = heads.q_gain, heads.k_gain
    _attend[(parts, lanes)](
        x_BP, *(x_BP if gain is None else gain.weight for gain in (q_gain, k_gain)), cosine, sine, keys, values, pages,
        store.positions_B, gate, o_BC, sums, norms, arrived,
        x_BP.stride(0), q_first, k_first or 0, v_first or 0, *keys.stride()[:3], *values.stride()[:3],
        pages.stride(0), gate.stride(0), o_BC.stride(0),
        *(0.0 if gain is None else gain.epsilon for gain in (q_gain, k_gain)), heads.v_epsilon or 0.0,
        heads.scale * math.log2(math.e), parts, repeats, groups, width,
        LENGTH=length, RING=table_BM is None, OWN=k_first is not None, Q_NORMED=q_gain is not None,
        K_NORMED=k_gain is not None, V_NORMED=heads.v_epsilon is not None, TURNED=table is not None,
        GATED=gate_BC is not None, SPLITS=splits, ROWS=ROWS, WIDE=wide, BLOCK=block,
        JOINS=parts <= FEW_PARTS, JOINED=joined, REPEATS=own, EARLY=soon,
        num_warps=warps, num_stages=1, launch_pdl=soon,
    )  # fmt: skip
    if parts > FEW_PARTS:
        _join[(batch * heads.heads, triton.cdiv(width, JOIN[1]))](
            sums, norms, gate, o_BC, gate.stride(0), o_BC.stride(0), parts, repeats, heads.heads, width,
            GATED=gate_BC is not None, PARTS=JOIN[0], BLOCK=JOIN[1], EARLY=soon, num_warps=4, launch_pdl=soon,
        )  # fmt: skip


def sizes(wide: int) -> tuple[int, int]:
    """Tokens of a block and warps of a program, by the head width."""
    if wide <= 128:
        return 64, 4
    return (32, 8) if wide <= 256 else (16, 8)


@triton.jit
def _placed(
    x_RN, other_RN, own_1N, cosine_1N, sine_1N, width, epsilon, NORMED: tl.constexpr, TURNED: tl.constexpr
):
    """Heads [R, N], float32, behind their norm and rotation; pair j is channels j and j + N/2.

    `other_RN` has the other channel of each pair, and `own_1N` the norm's weights of both.
    """
    weight_1N, other_weight_1N = own_1N
    if NORMED:
        root_R1 = tl.rsqrt(tl.sum(x_RN * x_RN, 1) / width + epsilon)[:, None]
        x_RN *= root_R1 * weight_1N
        if TURNED:
            other_RN *= root_R1 * other_weight_1N
    if TURNED:
        x_RN = x_RN * cosine_1N + other_RN * sine_1N
    return x_RN


@triton.jit
def _row(start, wide_1N, in_1N):
    """[1, N] of a vector, float32."""
    return tl.load(start + wide_1N, mask=in_1N, other=0.0).to(tl.float32)


@triton.jit
def _stored(
    store, table, batch, group, token_S, in_S, wide_N, in_N, store_p, store_l, store_g, LENGTH: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Keys or values [S, N] of some tokens."""
    page_S = token_S.to(tl.int64) * 0 + batch
    if not RING:
        page_S = tl.load(table + token_S // LENGTH, mask=in_S, other=0).to(tl.int64)
    at_S = page_S * store_p + (token_S % LENGTH) * store_l + group * store_g
    return tl.load(store + at_S[:, None] + wide_N[None, :], mask=in_S[:, None] & in_N[None, :], other=0.0)


@triton.jit
def _attend(
    x, q_weight, k_weight, cosine, sine, keys, values, table, positions, gate, o, sums, norms, arrived, x_b, q_first,
    k_first, v_first, keys_p, keys_l, keys_g, values_p, values_l, values_g, table_b, gate_b, o_b, q_epsilon, k_epsilon,
    v_epsilon, scale, parts, repeats, groups, width, LENGTH: tl.constexpr, RING: tl.constexpr, OWN: tl.constexpr,
    Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr, V_NORMED: tl.constexpr, TURNED: tl.constexpr, GATED: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, JOINS: tl.constexpr,
    JOINED: tl.constexpr, REPEATS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    part, lane = tl.program_id(0), tl.program_id(1)
    batch, group = (lane // SPLITS // groups).to(tl.int64), lane // SPLITS % groups
    first_head = (lane - batch.to(tl.int32) * groups * SPLITS) * repeats
    row_R, wide_N, block_S = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, BLOCK)
    in_R, in_N = row_R < repeats, wide_N < width
    in_RN = in_R[:, None] & in_N[None, :]
    position = tl.load(positions + batch).to(tl.int32)
    length, newest = position + 1, position
    if RING:
        length, newest = tl.minimum(length, LENGTH), position % LENGTH
    table += batch * table_b
    # Blocks of a part, so that the parts are even and end at borders of blocks.
    share = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    first, last = part * share, tl.minimum((part + 1) * share, length)
    token_S = first + block_S
    in_S = (token_S < last) & (token_S != newest)
    next_k_SN = _stored(
        keys, table, batch, group, token_S, in_S, wide_N, in_N, keys_p, keys_l, keys_g, LENGTH, RING
    )
    next_v_SN = _stored(
        values, table, batch, group, token_S, in_S, wide_N, in_N, values_p, values_l, values_g, LENGTH, RING
    )
    wide_1N, in_1N = wide_N[None, :], in_N[None, :]
    pairs = width // 2
    other_1N = tl.where(wide_1N < pairs, wide_1N + pairs, wide_1N - pairs)
    q_own_1N, k_own_1N = (wide_1N, wide_1N), (wide_1N, wide_1N)
    if Q_NORMED:
        q_own_1N = (_row(q_weight, wide_1N, in_1N), _row(q_weight, other_1N, in_1N))
    if K_NORMED:
        k_own_1N = (_row(k_weight, wide_1N, in_1N), _row(k_weight, other_1N, in_1N))
    admit_next(EARLY)
    await_former(EARLY)
    # All that is read comes before the first sum over channels, for which a program's threads wait for each other.
    x += batch * x_b
    head_R1 = (first_head + row_R)[:, None] * width
    x_RN = tl.load(x + q_first + head_R1 + wide_1N, mask=in_RN, other=0.0).to(tl.float32)
    x_other_RN, cosine_1N, sine_1N = x_RN, wide_1N, wide_1N
    if TURNED:
        x_other_RN = tl.load(x + q_first + head_R1 + other_1N, mask=in_RN, other=0.0).to(tl.float32)
        cosine_1N = _row(cosine + batch * width, wide_1N, in_1N)
        sine_1N = _row(sine + batch * width, wide_1N, in_1N)
    if OWN:
        k_1N = _row(x + k_first + group * width, wide_1N, in_1N)
        v_1N = _row(x + v_first + group * width, wide_1N, in_1N)
        k_other_1N = k_1N
        if TURNED:
            k_other_1N = _row(x + k_first + group * width, other_1N, in_1N)
    page, place = batch, newest % LENGTH
    if not RING:
        page = tl.load(table + newest // LENGTH).to(tl.int64)
    at_k_1N = keys + page * keys_p + place * keys_l + group * keys_g + wide_1N
    at_v_1N = values + page * values_p + place * values_l + group * values_g + wide_1N
    q_RN = _placed(x_RN, x_other_RN, q_own_1N, cosine_1N, sine_1N, width, q_epsilon, Q_NORMED, TURNED)
    q_RN = q_RN.to(keys.dtype.element_ty)
    most_R = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    sum_RN = tl.zeros((ROWS, WIDE), tl.float32)
    if part == 0:
        if OWN:
            k_1N = _placed(k_1N, k_other_1N, k_own_1N, cosine_1N, sine_1N, width, k_epsilon, K_NORMED, TURNED)
            k_1N = k_1N.to(keys.dtype.element_ty).to(tl.float32)
            if V_NORMED:
                v_1N *= tl.rsqrt(tl.sum(v_1N * v_1N, 1) / width + v_epsilon)[:, None]
            v_1N = v_1N.to(values.dtype.element_ty).to(tl.float32)
            if lane % SPLITS == 0:
                tl.store(at_k_1N, k_1N.to(keys.dtype.element_ty), mask=in_1N)
                tl.store(at_v_1N, v_1N.to(values.dtype.element_ty), mask=in_1N)
        else:
            k_1N = tl.load(at_k_1N, mask=in_1N, other=0.0).to(tl.float32)
            v_1N = tl.load(at_v_1N, mask=in_1N, other=0.0).to(tl.float32)
        most_R = tl.sum(q_RN.to(tl.float32) * k_1N, 1) * scale
        sum_R += 1
        sum_RN += v_1N
    for start in range(first, last, BLOCK):
        k_SN, v_SN, in_now_S = next_k_SN, next_v_SN, in_S
        token_S = start + BLOCK + block_S
        in_S = (token_S < last) & (token_S != newest)
        next_k_SN = _stored(
            keys, table, batch, group, token_S, in_S, wide_N, in_N, keys_p, keys_l, keys_g, LENGTH, RING
        )
        next_v_SN = _stored(
            values,
            table,
            batch,
            group,
            token_S,
            in_S,
            wide_N,
            in_N,
            values_p,
            values_l,
            values_g,
            LENGTH,
            RING,
        )
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
    tl.store(sums + at_R[:, None] * width + wide_N[None, :], sum_RN, mask=in_RN)
    tl.store(norms + at_R * 2, most_R, mask=in_R)
    tl.store(norms + at_R * 2 + 1, sum_R, mask=in_R)
    if JOINS:
        # All of this program's writes are there before it is counted, and those of all others where it is the last.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + lane, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if before == parts - 1:
            tl.store(arrived + lane, 0)
            own_R, part_C = tl.arange(0, REPEATS), tl.arange(0, JOINED)
            in_own_R = own_R < repeats
            from_R = lane.to(tl.int64) * parts * repeats + own_R
            highest_R = tl.full((REPEATS,), float("-inf"), tl.float32)
            total_R = tl.zeros((REPEATS,), tl.float32)
            total_RN = tl.zeros((REPEATS, WIDE), tl.float32)
            for start in range(0, parts, JOINED):
                at_CR = from_R[None, :] + (start + part_C)[:, None] * repeats
                in_CR = (start + part_C < parts)[:, None] & in_own_R[None, :]
                most_CR = tl.load(norms + at_CR * 2, mask=in_CR, other=float("-inf"), cache_modifier=".cg")
                sum_CR = tl.load(norms + at_CR * 2 + 1, mask=in_CR, other=0.0, cache_modifier=".cg")
                sum_CRN = tl.load(
                    sums + at_CR[:, :, None] * width + wide_N[None, None, :],
                    mask=in_CR[:, :, None] & in_N[None, None, :], other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                higher_R = tl.maximum(highest_R, tl.max(most_CR, 0))
                base_R = tl.where(higher_R == float("-inf"), 0.0, higher_R)
                weight_CR = tl.exp2(most_CR - base_R[None, :])
                old_R = tl.exp2(highest_R - base_R)
                total_R = total_R * old_R + tl.sum(weight_CR * sum_CR, 0)
                total_RN = total_RN * old_R[:, None] + tl.sum(weight_CR[:, :, None] * sum_CRN, 0)
                highest_R = higher_R
            o_RN = total_RN / tl.where(in_own_R, total_R, 1.0)[:, None]
            at_RN = (first_head + own_R)[:, None] * width + wide_N[None, :]
            in_own_RN = in_own_R[:, None] & in_N[None, :]
            if GATED:
                o_RN *= tl.load(gate + batch * gate_b + at_RN, mask=in_own_RN, other=0.0).to(tl.float32)
            tl.store(o + batch * o_b + at_RN, o_RN.to(o.dtype.element_ty), mask=in_own_RN)


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
