"""The WKV-7 recurrence for one token a sequence, which is what decoding asks for: one launch, bound by its bytes.

    u = S^T a;  S <- diag(exp(log_w)) S + b u^T + k v^T;  o = S^T r

The state is read once and written once, 8 K V bytes a head; all else is a sixtieth of that at K = V = 128. Of two forms
`wkv7_step_` updates the state where it lies, for an engine that owns its states, and `wkv7_step` leaves it alone. Where
the kernel does not fit (a CPU, float64), `wkv7_step_` is a few operators of torch.
`benchmarks/wkv7_gpu.py` times both beside a copy of the same bytes.

Legend: B batch (sequences), H heads, K key width, V value width.
"""

import torch
from torch import Tensor

__all__ = ["fits", "wkv7_step", "wkv7_step_"]

WIDEST_KEY = 256  # a program holds whole columns of the state, in registers


def fits(v_B1HV: Tensor, state_BHKV: Tensor) -> bool:
    """Whether the kernel takes these: one token, a GPU, a float32 state, K at most 256, no float64.

    A state whose matrices [K, V] do not lie in one piece is not taken, since it is not to be copied.
    """
    key_width, value_width = state_BHKV.shape[2:]
    dense = state_BHKV.stride()[2:] == (value_width, 1)
    kinds = state_BHKV.dtype == torch.float32 and v_B1HV.dtype != torch.float64
    return v_B1HV.is_cuda and v_B1HV.shape[1] == 1 and kinds and dense and key_width <= WIDEST_KEY


def wkv7_step(
    r_B1HK: Tensor,
    log_w_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1HK: Tensor,
    b_B1HK: Tensor,
    state_BHKV: Tensor,
    reset_B1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `trihybrid.ops.wkv7.wkv7`, which has the formula and the meaning of every argument; no gradient.

    r, log_w, k, a, b [B, 1, H, K], v [B, 1, H, V]: float32, bfloat16 or float16, each its own; any strides.
    state_BHKV: float32, dense in [K, V]; `fits` says what the kernel takes.
    reset_B1: bool, True where a document starts: neither the state nor log_w is read there; None for no resets.
    Computed in float32. Returns (o_B1HV in v's dtype, the new state).
    """
    return _step(r_B1HK, log_w_B1HK, k_B1HK, v_B1HV, a_B1HK, b_B1HK, state_BHKV, reset_B1)


def wkv7_step_(
    r_B1HK: Tensor,
    log_w_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1HK: Tensor,
    b_B1HK: Tensor,
    state_BHKV: Tensor,
    reset_B1: Tensor | None = None,
) -> Tensor:
    """As `wkv7_step`, with the state updated in place: it may be a slice of a larger store. Returns o_B1HV.

    Takes any device, and computes in the state's dtype where the kernel does not fit.
    """
    tokens = (r_B1HK, log_w_B1HK, k_B1HK, v_B1HV, a_B1HK, b_B1HK)
    if fits(v_B1HV, state_BHKV):
        return _step_in_place(*tokens, state_BHKV, reset_B1)
    r_BHK, log_w_BHK, k_BHK, v_BHV, a_BHK, b_BHK = (x[:, 0].to(state_BHKV.dtype) for x in tokens)
    if reset_B1 is not None:
        state_BHKV.masked_fill_(reset_B1[:, :, None, None], 0.0)
        log_w_BHK = log_w_BHK.masked_fill(reset_B1[:, :, None], 0.0)
    u_BHV = (a_BHK.unsqueeze(-2) @ state_BHKV).squeeze(-2)
    # Both corrections of rank one are one of rank two.
    change_BHKV = torch.stack([b_BHK, k_BHK], -1) @ torch.stack([u_BHV, v_BHV], -2)
    state_BHKV.mul_(log_w_BHK.exp().unsqueeze(-1)).add_(change_BHKV)
    o_BHV = (r_BHK.unsqueeze(-2) @ state_BHKV).squeeze(-2)
    return o_BHV.to(v_B1HV.dtype).unsqueeze(1)


@torch.library.custom_op("trihybrid::wkv7_step", mutates_args=(), device_types="cuda")
def _step(
    r_B1HK: Tensor,
    log_w_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1HK: Tensor,
    b_B1HK: Tensor,
    state_BHKV: Tensor,
    reset_B1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from trihybrid.ops.wkv7.decode.triton import launch

    after_BHKV = state_BHKV.new_empty(state_BHKV.shape)
    tokens = (r_B1HK, log_w_B1HK, k_B1HK, v_B1HV, a_B1HK, b_B1HK)
    return launch(tokens, state_BHKV, after_BHKV, reset_B1), after_BHKV


@_step.register_fake
def _(
    r_B1HK: Tensor,
    log_w_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1HK: Tensor,
    b_B1HK: Tensor,
    state_BHKV: Tensor,
    reset_B1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return v_B1HV.new_empty(v_B1HV.shape), state_BHKV.new_empty(state_BHKV.shape)


@torch.library.custom_op("trihybrid::wkv7_step_in_place", mutates_args=("state_BHKV",), device_types="cuda")
def _step_in_place(
    r_B1HK: Tensor,
    log_w_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1HK: Tensor,
    b_B1HK: Tensor,
    state_BHKV: Tensor,
    reset_B1: Tensor | None,
) -> Tensor:
    from trihybrid.ops.wkv7.decode.triton import launch

    return launch((r_B1HK, log_w_B1HK, k_B1HK, v_B1HV, a_B1HK, b_B1HK), state_BHKV, state_BHKV, reset_B1)


@_step_in_place.register_fake
def _(
    r_B1HK: Tensor,
    log_w_B1HK: Tensor,
    k_B1HK: Tensor,
    v_B1HV: Tensor,
    a_B1HK: Tensor,
    b_B1HK: Tensor,
    state_BHKV: Tensor,
    reset_B1: Tensor | None,
) -> Tensor:
    return v_B1HV.new_empty(v_B1HV.shape)
