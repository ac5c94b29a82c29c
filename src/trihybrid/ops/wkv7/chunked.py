"""WKV-7 in chunks of C tokens, as dense products, with a hand-written backward. Runs wherever torch does.

Shapes: B batch, T time, H heads, K key width, V value width, C tokens of a chunk; b, h: the batches and heads of a
block, n its chunks, N = n b h. A dimension of size C + 1 holds c'_1, c_1, .., c_C (below).

The maths of one chunk: the WY form of a diagonal-plus-low-rank recurrence (DeltaNet, arXiv 2406.06484; RWKV-7, arXiv
2503.14456), arranged for few large products. S is the state [K, V] that enters, c_i = sum_{j <= i} log_w_j,
c'_i = c_{i-1}, and m is c in the middle of the chunk. Rows are
    A = a e^{c' - m},  R = r e^{c - m},  B = b e^{m - c},  K = k e^{m - c}
so that an exponent spans at most half a chunk. With X = [U; V], where the rows of U are u_t, and S~ = e^m S:
    [L M; Q P] = mask([A; R] [B; K]^T)    L and M strictly below the diagonal, Q and P with the diagonal
    F = (I - L)^{-1},  W = F A
    U = F M V + W S~,   o = R S~ + Q U + P V,   Y = S~ + [B; K]^T X,   the state that leaves is e^{c_C - m} Y.
Only U and Y form the serial chain. Scaling the state by e^m, where the textbook scales A, R by e^m and B, K by
e^{c_C - m}, saves four passes over the rows. Backward, with dY = e^{c_C - m} dS' (S': what leaves):
    dU = Q^T do + B dY,   dS~ = dY + W^T dU + R^T do          the same chain in reverse
    Z = F^T dU,   G = mask([Z; do] X^T),   dV = [M; P]^T [Z; do] + K dY
    d[A; R] = G [B; K] + [Z; do] S~^T,     d[B; K] = G^T [A; R] + X dY^T
An exponent's gradient is x dx of its row (negative for B and K), and S dS where the state enters and leaves; log_w
gets them through the transpose of the map from log_w to the exponents.

A document that starts inside a chunk: pairs of different documents are masked, rows of A and R after the first border
do not meet S~, rows of B and K before the last border do not enter Y, and neither does S~.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from trihybrid.ops.wkv7.blocks import Prepared, as_rows, as_tokens, centring, plan_blocks, prepare
from trihybrid.ops.wkv7.reference import wkv7_reference

logger = logging.getLogger(__name__)

# Tokens of a chunk, a power of two. On a CPU 16 beats 32 for K = 16 to 64; at K = 128 they are about equal.
CHUNK_LENGTH = 16
# Half a chunk of log_w must stay inside, and its factors are multiplied in pairs: e^80 = 6e34 still fits float32.
LARGEST_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}
# The gradient of log_w is a difference of terms that do not shrink with the decay. In float32 its relative error grows
# like 1e-7 / w (3e-5 at log_w = -5, if all channels of a head decay like that); from here on float64 is used.
STEEPEST_FLOAT32_GRADIENT = 3.0
# Floats of one [C, K] operand over the chunks, batches and heads that are worked on together: they stay in cache.
BLOCK_FLOATS = 262144


def _forward_block(
    ready: Prepared, v: torch.Tensor, state_MKV: torch.Tensor, o: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the outputs of a block into o; return X [N, 2C, V] and the states [n + 1, b h, K, V].

    The states are the scaled ones (S~) that enter each chunk, and last the true one that leaves the block.
    """
    block, length = ready.block, ready.block.length
    v_rows = as_rows(block.view(v))
    count, batch, heads, _, width = v_rows.shape
    lanes = batch * heads
    x = v.new_empty(count, batch, heads, 2 * length, width)
    x[..., length:, :] = v_rows
    x = x.flatten(0, 2)
    u = x[:, :length]
    # u is no dense batch of matrices, and products into such a view are slow: they go into u_offset, then are copied.
    u_offset = torch.bmm(torch.bmm(ready.inverse, ready.scores[:, :length, length:]), x[:, length:])
    w, bk_state = ready.rw[:, length:], ready.bk_state.mT
    states = v.new_empty(count + 1, *state_MKV.shape)
    torch.mul(state_MKV, ready.enter, out=states[0])
    for i in range(count):
        part = slice(i * lanes, (i + 1) * lanes)
        u[part] = u_offset[part].baddbmm_(w[part], states[i])
        kept = states[i] if ready.borders is None else states[i] * ready.borders.survives_nM[i]
        torch.baddbmm(kept, bk_state[part], x[part], out=states[i + 1]).mul_(ready.leave[i])
    out = torch.bmm(ready.rw[:, :length], states[:-1].flatten(0, 1))
    out.baddbmm_(ready.scores[:, length:], x)
    block.write(o, as_tokens(out, block))
    return x, states


def _backward_block(
    ready: Prepared,
    x: torch.Tensor,
    states: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
    do: torch.Tensor,
    dstate_MKV: torch.Tensor,
    gradients: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Write the gradients of a block; return that of the state that enters it. dstate_MKV is of the one that leaves.

    inputs: r, log_w, k, a, b; gradients: of r, log_w, k, v, a, b; both over all tokens.
    """
    block, length = ready.block, ready.block.length
    dr, dlog_w, dk, dv, da, db = gradients
    do_rows = as_rows(block.view(do))
    count, batch, heads, _, width = do_rows.shape
    lanes = batch * heads
    # Z; do; dU in one buffer, since both the upper and the lower two thirds are operands.
    zou = x.new_empty(count, batch, heads, 3 * length, width)
    zou[..., length : 2 * length, :] = do_rows
    zou = zou.flatten(0, 2)
    zo, ou = zou[:, : 2 * length], zou[:, length:]
    du = torch.bmm(ready.scores[:, length:, :length].mT, zo[:, length:])
    b_state, k_state, rw = ready.bk_state[:, :length], ready.bk_state[:, length:], ready.rw.mT
    dstates, dy = torch.empty_like(states), torch.empty_like(states[:-1])
    dstates[-1] = dstate_MKV
    for i in reversed(range(count)):
        part = slice(i * lanes, (i + 1) * lanes)
        torch.mul(dstates[i + 1], ready.leave[i], out=dy[i])
        ou[part, length:] = du[part].baddbmm_(b_state[part], dy[i])
        kept = dy[i] if ready.borders is None else dy[i] * ready.borders.survives_nM[i]
        torch.baddbmm(kept, rw[part], ou[part], out=dstates[i])
    dy = dy.flatten(0, 1)
    zo[:, :length] = torch.bmm(ready.inverse.mT, du)
    block.write(dv, as_tokens(torch.bmm(ready.scores[:, :, length:].mT, zo).baddbmm_(k_state, dy), block))

    g = torch.bmm(zo, x.mT)
    ready.mask_(g)
    dar = torch.bmm(zo, states[:-1].flatten(0, 1).mT)
    dbk = torch.bmm(x, dy.mT)
    if ready.borders is not None:
        dar *= ready.borders.meets_N
        dbk *= ready.borders.enters_N
    dar = as_tokens(dar.baddbmm_(g, ready.bk), block)
    dbk = as_tokens(dbk.baddbmm_(g.mT, ready.ar), block)

    dentering = dstates[0] * ready.enter
    ends = dstates.mul_(states).sum(-1).view(count + 1, batch, heads, -1).transpose(0, 1)
    r, log_w, k, a, b = (block.view(x_BTHK) for x_BTHK in inputs)
    dexponents = x.new_empty(batch, count, length + 1, heads, log_w.shape[-1])
    dexponents[:, :, -1] = ends[:, 1:]
    product = x.new_empty(log_w.shape)
    torch.mul(dar[:, :, :length], ready.grow, out=product)
    block.write(da, product)
    torch.mul(product, a, out=dexponents[:, :, :-1])
    dexponents[:, :, 0] -= ends[:, :-1]
    for out, row, dx_row, factor, sign in (
        (dr, r, dar[:, :, length:], ready.fall, 1),
        (db, b, dbk[:, :, :length], ready.rise, -1),
        (dk, k, dbk[:, :, length:], ready.rise, -1),
    ):
        torch.mul(dx_row, factor, out=product)
        block.write(out, product)
        dexponents[:, :, 1:].addcmul_(product, row, value=sign)
    flat = dexponents.flatten(3).flatten(0, 1)
    dlog_w_flat = torch.bmm(centring(length, flat).mT.expand(len(flat), -1, -1), flat)
    block.write(dlog_w, dlog_w_flat.view(log_w.shape))
    return dentering


def _forward(
    tensors: Sequence[torch.Tensor], reset_BT: torch.Tensor | None, length: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Outputs, final state and, with keep, what the backward needs beside the inputs: X and states of every block."""
    r, log_w, k, v, a, b, state_BHKV = tensors
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final_BHKV = torch.empty(state_BHKV.shape, dtype=v.dtype, device=v.device)
    saved: list[torch.Tensor] = []
    for blocks in plan_blocks(r.shape, length, BLOCK_FLOATS):
        group = (blocks[0].batches, blocks[0].heads)
        final_bhKV = final_BHKV[group]
        state_MKV = state_BHKV[group].flatten(0, 1)
        for block in blocks:
            ready = prepare(block, r, log_w, k, a, b, reset_BT)
            x, states = _forward_block(ready, v, state_MKV, o)
            state_MKV = states[-1]
            if keep:
                saved += [x, states]
        final_bhKV.copy_(state_MKV.view_as(final_bhKV))
    return o, final_BHKV, saved


class _ChunkedWKV7(torch.autograd.Function):
    """Saves r, log_w, k, a, b, and the state that enters each chunk with [U; V]; prepares the rest again."""

    @staticmethod
    def forward(ctx, r, log_w, k, v, a, b, state_BHKV, reset_BT, length):
        o, final_BHKV, saved = _forward((r, log_w, k, v, a, b, state_BHKV), reset_BT, length, keep=True)
        ctx.save_for_backward(r, log_w, k, a, b, reset_BT, *saved)
        ctx.length = length
        return o, final_BHKV

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal_BHKV):
        r, log_w, k, a, b, reset_BT, *saved = ctx.saved_tensors
        inputs = (r, log_w, k, a, b)
        gradients = tuple(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, log_w, k, do, a, b)
        )
        dstate_BHKV = torch.empty(dfinal_BHKV.shape, dtype=r.dtype, device=r.device)
        position = 0
        with torch.autocast(r.device.type, enabled=False):
            for blocks in plan_blocks(r.shape, ctx.length, BLOCK_FLOATS):
                group = (blocks[0].batches, blocks[0].heads)
                dstate_bhKV = dstate_BHKV[group]
                dstate_MKV = dfinal_BHKV[group].flatten(0, 1)
                kept = saved[position : position + 2 * len(blocks)]
                position += 2 * len(blocks)
                for block, x, states in reversed(list(zip(blocks, kept[::2], kept[1::2], strict=True))):
                    ready = prepare(block, *inputs, reset_BT)
                    dstate_MKV = _backward_block(ready, x, states, inputs, do, dstate_MKV, gradients)
                dstate_bhKV.copy_(dstate_MKV.view_as(dstate_bhKV))
        return *gradients, dstate_BHKV, None, None


@functools.cache
def _log_double() -> None:
    logger.info("wkv7 chunked: decay too strong for float32, computing in float64")


def _dtype_and_length(log_w_BTHK: torch.Tensor, gradient: bool) -> tuple[torch.dtype, int]:
    """The dtype to compute in, and the longest chunk, at most CHUNK_LENGTH, whose exponents it holds.

    ValueError when not even two tokens fit. A NaN passes, and goes on to the outputs.
    """
    low, high = (x.item() for x in torch.aminmax(log_w_BTHK.detach()))
    largest = max(-low, high)
    dtype, length = log_w_BTHK.dtype, CHUNK_LENGTH
    if dtype == torch.float32 and (
        largest > LARGEST_EXPONENT[dtype] or (gradient and largest > STEEPEST_FLOAT32_GRADIENT)
    ):
        dtype = torch.float64
        _log_double()
    limit = LARGEST_EXPONENT[dtype]
    while length > 2 and largest * length / 2 > limit:
        length //= 2
    if largest * length / 2 > limit:
        raise ValueError(
            f"log_w_BTHK lies in {low:g} .. {high:g}; the chunked backend of wkv7 takes {-limit:g} .. {limit:g}: "
            "clamp it, or ask for backend='reference'"
        )
    return dtype, length


def wkv7_chunked(
    r_BTHK: torch.Tensor,
    log_w_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    a_BTHK: torch.Tensor,
    b_BTHK: torch.Tensor,
    state_BHKV: torch.Tensor,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `wkv7_reference`, in chunks; a single token (decoding) is one step of the recurrence itself.

    All tensors but reset_BT (bool, or None) share one dtype, float32 or float64, and one device. log_w_BTHK may lie
    anywhere in -300 .. 300; outside it is a ValueError. Beyond 5 in size the chunks get shorter, and beyond 3 (with a
    gradient; else 40) float32 arguments are computed in float64, which is logged once: both are slower.
    Gradients flow to all tensors but reset_BT, once: differentiating them again is a RuntimeError.
    Memory kept for the backward: the inputs, twice the size of v, and one state for every 16 tokens.
    Returns (o_BTHV, state_BHKV) in the dtype of the arguments.
    """
    if r_BTHK.shape[1] == 1:
        return wkv7_reference(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV, reset_BT)
    if reset_BT is not None:
        # The decay of the first token of a document acts on nothing, whatever it holds.
        log_w_BTHK = log_w_BTHK.masked_fill(reset_BT[:, :, None, None], 0.0)
        # So does a state that the first token replaces, even one that is not finite.
        state_BHKV = state_BHKV.masked_fill(reset_BT[:, 0, None, None, None], 0.0)
    tensors = (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    dtype, length = _dtype_and_length(log_w_BTHK, gradient)
    converted = [x.to(dtype) for x in tensors]
    if gradient:
        o_BTHV, final_BHKV = _ChunkedWKV7.apply(*converted, reset_BT, length)
    else:
        o_BTHV, final_BHKV, _ = _forward(converted, reset_BT, length, keep=False)
    return o_BTHV.to(v_BTHV.dtype), final_BHKV.to(v_BTHV.dtype)
