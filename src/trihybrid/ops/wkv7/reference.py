"""The WKV-7 recurrence, one token after the other: the definition that every fast path is held to.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

import torch


def step(
    r_BHK: torch.Tensor,
    log_w_BHK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    a_BHK: torch.Tensor,
    b_BHK: torch.Tensor,
    state_BHKV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the recurrence (RWKV-7, arXiv 2503.14456, with the state S held as [K, V]).

    u = S^T a;  S <- diag(exp(log_w)) S + b u^T + k v^T;  o = S^T r. All arguments share one floating dtype.
    Returns (o_BHV, state_BHKV): the output and the updated state.
    """
    u_BH1V = a_BHK.unsqueeze(-2) @ state_BHKV
    state_BHKV = (
        log_w_BHK.exp().unsqueeze(-1) * state_BHKV
        + b_BHK.unsqueeze(-1) * u_BH1V
        + k_BHK.unsqueeze(-1) * v_BHV.unsqueeze(-2)
    )
    o_BH1V = r_BHK.unsqueeze(-2) @ state_BHKV
    return o_BH1V.squeeze(-2), state_BHKV


def wkv7_reference(
    r_BTHK: torch.Tensor,
    log_w_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    a_BTHK: torch.Tensor,
    b_BTHK: torch.Tensor,
    state_BHKV: torch.Tensor,
    reset_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence over T >= 1 tokens, differentiated by autograd; `trihybrid.ops.wkv7.wkv7` says what it computes.

    All tensors but reset_BT (bool, or None) share one floating dtype and one device.
    Returns (o_BTHV, state_BHKV) in that dtype.
    """
    if reset_BT is not None:
        # The decay of the first token of a document acts on nothing.
        log_w_BTHK = log_w_BTHK.masked_fill(reset_BT[:, :, None, None], 0.0)
    outputs = []
    # unbind, because the gradient of x[:, t] would be a tensor of the size of x for every t.
    tokens = zip(*(x.unbind(1) for x in (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)), strict=True)
    for t, (r_BHK, log_w_BHK, k_BHK, v_BHV, a_BHK, b_BHK) in enumerate(tokens):
        if reset_BT is not None:
            state_BHKV = state_BHKV.masked_fill(reset_BT[:, t, None, None, None], 0.0)
        o_BHV, state_BHKV = step(r_BHK, log_w_BHK, k_BHK, v_BHV, a_BHK, b_BHK, state_BHKV)
        outputs.append(o_BHV)
    return torch.stack(outputs, dim=1), state_BHKV
