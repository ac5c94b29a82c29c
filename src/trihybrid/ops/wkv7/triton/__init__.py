"""WKV-7 on the tensor cores of a GPU: chunks of 16 tokens, forward and backward, in six kernels.

Forward: `prepare` (all chunks in parallel), then `state` (the serial chain, in parallel over heads and blocks of
values). Backward: the largest gradient, `state` in reverse, `sums` (over values, all groups of 64 tokens in parallel,
and scores, all chunks) and `gradient` (the rest). Kept from the forward are the inputs, U in two forms and what
`prepare` found in float16 (six and a half times the size of v), and one state in float16 for every 64 tokens.

Keys and values may be shared by groups of heads: `wkv7_triton_grouped` reads them once a group, and makes a, b and the
scaled keys inside of the kernels.

Legend: B batch, T time, H heads, K key width, V value width, C tokens of a chunk, N = B H chunks, G = B H groups of
tokens; of heads in k_BTGK, v_BTGV and kk_BTGK, where ungrouped tensors have G = H.
"""

import importlib.util
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["CHUNK", "wkv7_triton", "wkv7_triton_grouped"]

CHUNK = 16
GROUP = 64  # tokens between two kept states
WIDTHS = (16, 32, 64, 128)


def available(device: torch.device) -> str | None:
    """None on a GPU with bfloat16 tensor cores and Triton, else what is missing."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need an NVIDIA GPU of compute capability 8.0 (Ampere) or newer"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None


def takes(key_width: int, value_width: int, dtype: torch.dtype) -> str | None:
    """None for these widths and this dtype of v, else why the kernels do not take them."""
    for name, width in (("K", key_width), ("V", value_width)):
        if width not in WIDTHS:
            return f"the width {name} is {width}; the kernels take {', '.join(map(str, WIDTHS))}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"v is {dtype}; the kernels multiply float16, which is for bfloat16 and float16"
    return None


def wkv7_triton(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As `wkv7_reference`, with float16 operands (float32 sums) on the tensor cores; differentiable once.

    r, log_w, k, a, b [B, T, H, K], v [B, T, H, V]: bfloat16, float16 or float32, each as it comes; K and V 16, 32, 64
        or 128. log_w is at most 0, and what lies below -160 / C acts like that (-10 for C = 16).
    state_BHKV: float32, or None for zeros. reset_BT: bool, True at the first token of a document, or None.
    chunk: C, 16 or 32.

    Returns (o [B, T, H, V] in v's dtype, state [B, H, K, V] float32). ValueError for a width or a chunk that is not
    supported.
    """
    tokens = (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    return _run(tokens, state_BHKV, reset_BT, chunk, grouped=False)


def wkv7_triton_grouped(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    kk_BTGK: Tensor,
    iclr_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`trihybrid.ops.wkv7.grouped.wkv7_grouped`, which has the formula, in the precision of `wkv7_triton`, whose
    arguments and ValueErrors these are otherwise. What each head adds to the gradients of k, v and kk is rounded to
    bfloat16 where v is (float32 elsewhere), and then summed over its group in float32, in a fixed order.
    """
    tokens = (r_BTHK, log_w_BTHK, k_BTGK, v_BTGV, kk_BTGK, iclr_BTHK)
    return _run(tokens, state_BHKV, reset_BT, chunk, grouped=True)


def _run(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    state_BHKV: Tensor | None,
    reset_BT: Tensor | None,
    chunk: int,
    grouped: bool,
) -> tuple[Tensor, Tensor]:
    for name, width in (("K", tokens[0].shape[-1]), ("V", tokens[3].shape[-1])):
        if width not in WIDTHS:
            raise ValueError(f"the width {name} is {width}; the Triton backend of wkv7 takes one of {WIDTHS}")
    if chunk not in (16, 32):
        raise ValueError(f"chunk is {chunk}; the Triton backend of wkv7 takes 16 or 32")
    if state_BHKV is not None:
        state_BHKV = state_BHKV.float()
        if reset_BT is not None:
            # A state that the first token replaces does not act, even one that is not finite.
            state_BHKV = state_BHKV.masked_fill(reset_BT[:, 0, None, None, None], 0.0)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tokens, state_BHKV))
    arguments = (*tokens, state_BHKV, reset_BT, chunk, keep, grouped)
    if torch.compiler.is_compiling() or type(tokens[0]) is not Tensor:
        o_BTHV, last_BHKV, *_ = _forward(*arguments)
    elif keep:
        o_BTHV, last_BHKV, *_ = _Eager.apply(*arguments)
    else:
        o_BTHV, last_BHKV, *_ = _forward_kernels(*arguments)
    return o_BTHV, last_BHKV


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bytes(reset_BT: Tensor | None) -> Tensor | None:
    return None if reset_BT is None else reset_BT.contiguous().view(torch.uint8)


def _forward_kernels(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    a_BTGK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None,
    reset_BT: Tensor | None,
    chunk: int,
    keep: bool,
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the last state, and for the backward, empty without `keep`, states, U, the true U, fields of `Prepared`.

    grouped: whether a and b are kk and iclr.
    """
    from trihybrid.ops.wkv7.triton.prepare import Prepared, prepare
    from trihybrid.ops.wkv7.triton.state import walk

    r, log_w, k, v, a, b = (_dense(x) for x in (r_BTHK, log_w_BTHK, k_BTGK, v_BTGV, a_BTGK, b_BTHK))
    state = None if state_BHKV is None else state_BHKV.contiguous()
    ready = prepare(r, log_w, k, a, b, _bytes(reset_BT), chunk, gradient=keep, grouped=grouped)
    o_BTHV, last_BHKV, kept_GVK, u_NVC, true_u_NVC = walk(ready, v, r.shape[2], state, keep)
    if not keep:
        ready = Prepared(*(x.new_empty(0) for x in (ready.wide_4NCK, ready.square_4NCC, ready.g_NK)))
    return o_BTHV, last_BHKV, kept_GVK, u_NVC, true_u_NVC, ready.wide_4NCK, ready.square_4NCC, ready.g_NK


_forward = torch.library.custom_op("trihybrid::wkv7", _forward_kernels, mutates_args=())


@_forward.register_fake
def _(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    a_BTGK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None,
    reset_BT: Tensor | None,
    chunk: int,
    keep: bool,
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, keys = r_BTHK.shape
    width, lanes = v_BTGV.shape[-1], batch * heads
    count = lanes * ((length + chunk - 1) // chunk) if keep else 0
    half = partial(v_BTGV.new_empty, dtype=torch.float16)
    return (
        v_BTGV.new_empty(batch, length, heads, width),
        v_BTGV.new_empty(batch, heads, keys, width, dtype=torch.float32),
        half(lanes if keep else 0, (length + GROUP - 1) // GROUP + 1, width, keys),
        half(count, width, chunk),
        half(count, width, chunk),
        half(4, count, chunk, keys) if keep else half(0),
        half(4, count, chunk, chunk) if keep else half(0),
        v_BTGV.new_empty((count, keys) if keep else (0,), dtype=torch.float32),
    )


def _backward_kernels(
    do_BTHV: Tensor,
    dlast_BHKV: Tensor | None,
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    a_BTGK: Tensor,
    b_BTHK: Tensor,
    reset_BT: Tensor | None,
    kept_GVK: Tensor,
    u_NVC: Tensor,
    true_u_NVC: Tensor,
    wide_4NCK: Tensor,
    square_4NCC: Tensor,
    g_NK: Tensor,
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, log_w, k, v, a, b in their dtypes, and of the first state, float32."""
    from trihybrid.ops.wkv7.triton.gradient import differentiate
    from trihybrid.ops.wkv7.triton.prepare import Prepared
    from trihybrid.ops.wkv7.triton.state import largest_gradient, walk_back
    from trihybrid.ops.wkv7.triton.sums import sum_values

    do, r, log_w, k, v, a, b = (
        _dense(x) for x in (do_BTHV, r_BTHK, log_w_BTHK, k_BTGK, v_BTGV, a_BTGK, b_BTHK)
    )
    dlast = None if dlast_BHKV is None else dlast_BHKV.contiguous()
    reset = _bytes(reset_BT)
    largest_BH = largest_gradient(do, dlast)
    ready = Prepared(wide_4NCK, square_4NCC, g_NK)
    # In float32 where float16 might not hold what a loss was scaled by.
    parts = None if not grouped else v.dtype if v.dtype == torch.bfloat16 else torch.float32
    dv_BTHV, dfirst_BHKV, dkept_GVK, z_NVC, true_z_NVC = walk_back(
        ready, do, dlast, largest_BH, parts or v.dtype
    )
    sums_4NCK, scores_4NCC, e_GK = sum_values(
        ready, v, do, u_NVC, z_NVC, true_u_NVC, true_z_NVC, kept_GVK, dkept_GVK, largest_BH
    )
    del dkept_GVK, z_NVC, true_z_NVC  # before the gradients are allocated
    dr, dlog_w, dk, da, db = differentiate(
        (r, log_w, k, a, b), reset, scores_4NCC, sums_4NCK, e_GK, largest_BH, parts
    )
    if grouped:
        dk, dv_BTHV, da = (_summed(x, like) for x, like in ((dk, k), (dv_BTHV, v), (da, a)))
    return dr, dlog_w, dk, dv_BTHV, da, db, dfirst_BHKV


def _summed(x_BTHD: Tensor, like_BTGD: Tensor) -> Tensor:
    """The sum over the heads of each group, in float32, then in the dtype of `like_BTGD`."""
    x_BTGRD = x_BTHD.unflatten(2, (like_BTGD.shape[2], -1))
    return x_BTGRD.sum(3, dtype=torch.float32).to(like_BTGD.dtype)


_backward = torch.library.custom_op("trihybrid::wkv7_backward", _backward_kernels, mutates_args=())


@_backward.register_fake
def _(
    do_BTHV: Tensor,
    dlast_BHKV: Tensor | None,
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    a_BTGK: Tensor,
    b_BTHK: Tensor,
    reset_BT: Tensor | None,
    kept_GVK: Tensor,
    u_NVC: Tensor,
    true_u_NVC: Tensor,
    wide_4NCK: Tensor,
    square_4NCC: Tensor,
    g_NK: Tensor,
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, keys = r_BTHK.shape
    like = (x.new_empty(x.shape) for x in (r_BTHK, log_w_BTHK, k_BTGK, v_BTGV, a_BTGK, b_BTHK))
    dfirst_BHKV = v_BTGV.new_empty(batch, heads, keys, v_BTGV.shape[-1], dtype=torch.float32)
    return *like, dfirst_BHKV  # type: ignore[return-value]


def _keep(ctx, inputs, output) -> None:
    r, log_w, k, v, a, b, state, reset, _, _, ctx.grouped = inputs
    _, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(r, log_w, k, v, a, b, reset, *kept)
    ctx.has_state = state is not None


def _gradients(backward, ctx, do_BTHV, dlast_BHKV) -> tuple[Tensor | None, ...]:
    r, log_w, k, v, a, b, reset, *kept = ctx.saved_tensors
    if do_BTHV is None:
        do_BTHV = v.new_zeros(*r.shape[:3], v.shape[-1])
    *gradients, dstate_BHKV = backward(do_BTHV, dlast_BHKV, r, log_w, k, v, a, b, reset, *kept, ctx.grouped)
    return *gradients, dstate_BHKV if ctx.has_state else None, None, None, None, None


def _differentiate(ctx, do_BTHV, dlast_BHKV, *_kept) -> tuple[Tensor | None, ...]:
    return _gradients(_backward, ctx, do_BTHV, dlast_BHKV)


_forward.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which is for a compiler: with it, the host would take longer over a short
    sequence than a GPU over the kernels."""

    @staticmethod
    def forward(ctx, *arguments):
        output = _forward_kernels(*arguments)
        _keep(ctx, arguments, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BTHV, dlast_BHKV, *_kept):
        return _gradients(_backward_kernels, ctx, do_BTHV, dlast_BHKV)
