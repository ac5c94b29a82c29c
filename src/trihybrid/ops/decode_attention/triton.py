"""The kernels of `paged_attention`: a sequence is split over several programs, whose parts a second kernel joins.

Scores are kept in base 2, p = 2^(s - m) with s = scale log2(e) q . k and m the largest of a program's; parts of m, of
the sum of p and of the sum of p v are float32. How many programs there are depends on shapes alone, how many tokens
each takes on the length, so that a CUDA graph can record it.

Legend: R query heads of a group, rounded up to ROWS; S tokens of a block; D head width; C parts of a sequence.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # the fewest that a matrix product takes
LEAST = 128  # tokens of a part
PROGRAMS = 3  # for every processor


def launch(
    q_BHD: Tensor, keys_PLGD: Tensor, values_PLGD: Tensor, table_BM: Tensor, lengths_B: Tensor, scale: float
) -> Tensor:
    """[B, H, D] in the queries' dtype; queries dense, keys and values dense in D."""
    batch, heads, width = q_BHD.shape
    length, groups = keys_PLGD.shape[1:3]
    processors = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count
    most = triton.cdiv(table_BM.shape[1] * length, LEAST)
    parts = max(1, min(most, PROGRAMS * processors // (batch * groups)))
    device = q_BHD.device
    sums_BHCD = torch.empty((batch, heads, parts, width), dtype=torch.float32, device=device)
    norms_BHC2 = torch.empty((batch, heads, parts, 2), dtype=torch.float32, device=device)
    o_BHD = torch.empty_like(q_BHD)
    _part[(parts, batch * groups)](
        q_BHD, keys_PLGD, values_PLGD, table_BM, lengths_B, sums_BHCD, norms_BHC2,
        *keys_PLGD.stride()[:3], *values_PLGD.stride()[:3], table_BM.stride(0),
        scale * math.log2(math.e), parts, heads, groups,
        LENGTH=length, WIDTH=width, ROWS=ROWS, BLOCK=64 if width <= 128 else 32,
        num_warps=4 if width <= 256 else 8, num_stages=2,
    )  # fmt: skip
    _join[(batch * heads,)](
        sums_BHCD, norms_BHC2, o_BHD, parts, WIDTH=width, BLOCK=triton.next_power_of_2(PROGRAMS * processors),
        num_warps=4,
    )  # fmt: skip
    return o_BHD


# One program for tables of every width, here and below, or the first prompt of a length would wait for a compiler.
@triton.jit(do_not_specialize=["table_b", "parts"])
def _part(
    q, keys, values, table, lengths, sums, norms, keys_p, keys_l, keys_g, values_p, values_l, values_g, table_b,
    scale, parts, heads, groups, LENGTH: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, lane = tl.program_id(0), tl.program_id(1)
    batch, group = (lane // groups).to(tl.int64), lane % groups
    repeats = heads // groups
    length = tl.load(lengths + batch).to(tl.int32)
    # Blocks of a part, so that the parts are even and end at borders of blocks.
    share = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    first, last = part * share, tl.minimum((part + 1) * share, length)
    row_R, wide_D, block_S = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    head_R = batch * heads + group * repeats + row_R
    at_RD = head_R[:, None] * WIDTH + wide_D[None, :]
    in_R = row_R < repeats
    q_RD = tl.load(q + at_RD, mask=in_R[:, None], other=0.0)
    most_R = tl.full((ROWS,), float("-inf"), tl.float32)
    sum_R = tl.zeros((ROWS,), tl.float32)
    sum_RD = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(first, last, BLOCK):
        token_S = start + block_S
        in_S = token_S < last
        page_S = tl.load(table + batch * table_b + token_S // LENGTH, mask=in_S, other=0).to(tl.int64)
        place_S = token_S % LENGTH
        at_S = page_S * keys_p + place_S * keys_l + group * keys_g
        k_SD = tl.load(keys + at_S[:, None] + wide_D[None, :], mask=in_S[:, None], other=0.0)
        s_RS = tl.dot(q_RD, tl.trans(k_SD), input_precision="ieee") * scale
        s_RS = tl.where(in_S[None, :], s_RS, float("-inf"))
        new_R = tl.maximum(most_R, tl.max(s_RS, 1))
        old_R = tl.exp2(most_R - new_R)
        p_RS = tl.exp2(s_RS - new_R[:, None])
        at_S = page_S * values_p + place_S * values_l + group * values_g
        v_SD = tl.load(values + at_S[:, None] + wide_D[None, :], mask=in_S[:, None], other=0.0)
        sum_R = sum_R * old_R + tl.sum(p_RS, 1)
        sum_RD = sum_RD * old_R[:, None] + tl.dot(p_RS.to(v_SD.dtype), v_SD, input_precision="ieee")
        most_R = new_R
    at_R = head_R * parts + part
    tl.store(sums + at_R[:, None] * WIDTH + wide_D[None, :], sum_RD, mask=in_R[:, None])
    tl.store(norms + at_R * 2, most_R, mask=in_R)
    tl.store(norms + at_R * 2 + 1, sum_R, mask=in_R)


@triton.jit(do_not_specialize=["parts"])
def _join(sums, norms, o, parts, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    wide_D, part_C = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    in_C = part_C < parts
    most_C = tl.load(norms + (head * parts + part_C) * 2, mask=in_C, other=float("-inf"))
    sum_C = tl.load(norms + (head * parts + part_C) * 2 + 1, mask=in_C, other=0.0)
    # The first part always has a token, so the largest is a number.
    most = tl.max(most_C, 0)
    weight_C = tl.exp2(most_C - most)
    total = tl.sum(weight_C * sum_C, 0)
    sum_D = tl.zeros((WIDTH,), tl.float32)
    for part in range(parts):
        weight = tl.exp2(tl.load(norms + (head * parts + part) * 2) - most)
        sum_D += weight * tl.load(sums + (head * parts + part) * WIDTH + wide_D)
    tl.store(o + head * WIDTH + wide_D, (sum_D / total).to(o.dtype.element_ty))
