"""WKV-7 over parts of a sequence that are worked on at the same time: what one part does to any state that enters it,
how the parts are joined, and how gradients flow back through the joints.

Shapes: B batch, T time (of one part), H heads, K key width, V value width, P parts.

The recurrence is affine in its state, so a whole part p is one map, and its outputs are affine in the state as well:
    S_{p+1} = F_p S_p + E_p          F_p [K, K], E_p [K, V]
    o_t = (o_t from zero) + S_p^T n_t    n_t [K], the read of token t
E_p is the state that the part reaches from zero. F_p is the state that it reaches from the identity without values, and
the n_t are the outputs on that way. With all maps at hand, every part knows the state that enters it, and all run the
plain operator at once.

Backward. dS_p is the gradient of the state that enters part p, of the whole loss. The loss meets S_p in two ways,
through the outputs of the part, and through the state that leaves it:
    e_p = sum_t n_t do_t^T           through the outputs
    dS_p = F_p^T dS_{p+1} + e_p      and dS_P is the gradient of the final state
So the e_p, which need nothing but do, are exchanged, every part composes the dS_{p+1} of the state that leaves it, and
the plain operator's own backward, given do and dS_{p+1} with the true S_p inside, returns the exact gradients of
r, log_w, k, v, a, b. The maps themselves are never differentiated: the two gradients that would flow to the arguments
through F_p and E_p are dS_{p+1} S_p^T and dS_{p+1}, which is what dS_{p+1} at the end of the true pass amounts to. dS_0
is the gradient of the state that enters the whole.

Cost, where f is a forward and b a backward of the plain operator over a part: forward 3f (two for the maps), backward b
and one K x V product a token and head, against f and b. Kept for the backward, beside what the operator keeps: the
reads (the size of r, in v's dtype) and the maps (P B H K K).
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trihybrid.ops.wkv7 import wkv7


class Parts(Protocol):
    """Where the P parts of a sequence lie. One process works on some of them, as rows of its batch."""

    def gather(self, own: Tensor) -> Tensor:
        """Of all parts, in their order, [P, B, ..], from what the own rows hold, [rows, ..]."""
        ...

    def take(self, every_P: Tensor) -> Tensor:
        """The inverse of `gather`: the own rows of all parts."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes."""
        ...


def affine_map(
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    reset_BT: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What a piece of a sequence does to any state that enters it: S_T = F S_0 + E.

    Arguments, ValueErrors and gradients are those of `wkv7`. A reset anywhere in a row makes its F zero.
    Returns (F [B, H, K, K], E [B, H, K, V]), float64 where v is, else float32.
    """
    map_BHKK, end_BHKV, _ = _affine(k_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, reset_BT, backend)
    return map_BHKK, end_BHKV


def _affine(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    reset_BT: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """F, E, and the reads n [B, T, H, K] in the dtype of v."""
    _, end_BHKV = wkv7(r, log_w, k, v, a, b, None, reset_BT, backend)
    width = r.shape[-1]
    identity_BHKK = torch.eye(width, dtype=end_BHKV.dtype, device=v.device).expand(*end_BHKV.shape[:3], width)
    no_values_BTHK = v.new_zeros(()).expand(r.shape)
    reads_BTHK, map_BHKK = wkv7(r, log_w, k, no_values_BTHK, a, b, identity_BHKK, reset_BT, backend)
    return map_BHKK, end_BHKV, reads_BTHK


def _through(map_BHKK: Tensor, x_BHKV: Tensor) -> Tensor:
    """map @ x. Nothing passes a map of zeros (a reset), not even what is not finite."""
    passes_BH11 = map_BHKK.flatten(-2).any(-1)[:, :, None, None]
    return map_BHKK @ x_BHKV.masked_fill(~passes_BH11, 0.0)


def compose(maps_PBHKK: Tensor, ends_PBHKV: Tensor, state_BHKV: Tensor) -> Tensor:
    """The states that enter the P parts and, last, the one that leaves them all: [P + 1, B, H, K, V].

    maps_PBHKK, ends_PBHKV: F and E of all parts, in their order. state_BHKV: S_0. All share one dtype.
    """
    states = [state_BHKV]
    for map_BHKK, end_BHKV in zip(maps_PBHKK, ends_PBHKV, strict=True):
        states.append(_through(map_BHKK, states[-1]) + end_BHKV)
    return torch.stack(states)


def compose_backward(maps_PBHKK: Tensor, direct_PBHKV: Tensor, dfinal_BHKV: Tensor) -> Tensor:
    """The gradients of what `compose` returns, dS_0 .. dS_P: [P + 1, B, H, K, V].

    direct_PBHKV: e_p, the gradient of the state that enters a part through the outputs of that part alone.
    dfinal_BHKV: that of the final state.
    """
    gradients = [dfinal_BHKV]
    for map_BHKK, direct_BHKV in zip(maps_PBHKK.flip(0), direct_PBHKV.flip(0), strict=True):
        gradients.append(_through(map_BHKK.mT, gradients[-1]) + direct_BHKV)
    return torch.stack(gradients[::-1])


class _Joined(torch.autograd.Function):
    """Passes the outputs and the final state on. In the backward, which visits it before the operator's, it finds the
    gradient of the state that leaves each part, which no single part knows."""

    @staticmethod
    def forward(ctx, o_BTHV, last_BHKV, state_BHKV, final_BHKV, reads_BTHK, maps_PBHKK, parts):
        ctx.save_for_backward(reads_BTHK, maps_PBHKK)
        ctx.parts = parts
        # Detached, since a view that a function like this one returns cannot be changed in place.
        return o_BTHV.detach(), final_BHKV.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, do_BTHV, dfinal_BHKV):
        reads_BTHK, maps_PBHKK = ctx.saved_tensors
        parts: Parts = ctx.parts
        with torch.autocast(do_BTHV.device.type, enabled=False):
            reads_BHKT = reads_BTHK.to(maps_PBHKK.dtype).permute(0, 2, 3, 1)
            direct_BHKV = reads_BHKT @ do_BTHV.to(maps_PBHKK.dtype).transpose(1, 2)
            gradients = compose_backward(maps_PBHKK, parts.gather(direct_BHKV), parts.total(dfinal_BHKV))
        return do_BTHV, parts.take(gradients[1:]), gradients[0], None, None, None, None


def wkv7_parts(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None,
    reset_BT: Tensor | None,
    parts: Parts,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence in `parts`. Arguments are those of `wkv7`, where r .. b and reset hold the parts
    of this process as rows of the batch, and state_BHKV is S_0 of the whole sequence.

    Returns (the outputs of the own rows, the final state of the whole sequence). ValueErrors are those of `wkv7`.
    """
    tensors = (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    with torch.no_grad(), torch.autocast(v_BTHV.device.type, enabled=False):
        map_BHKK, end_BHKV, reads_BTHK = _affine(*tensors, reset_BT, backend)
        width = map_BHKK.shape[-1]
        gathered = parts.gather(torch.cat([map_BHKK, end_BHKV], -1))
        maps_PBHKK, ends_PBHKV = gathered[..., :width].contiguous(), gathered[..., width:]
    if state_BHKV is None:
        state_BHKV = torch.zeros_like(ends_PBHKV[0])
    if state_BHKV.shape != ends_PBHKV.shape[1:] or state_BHKV.device != v_BTHV.device:
        raise ValueError(
            f"state_BHKV has shape {tuple(state_BHKV.shape)} on {state_BHKV.device}; expected "
            f"{tuple(ends_PBHKV.shape[1:])} on {v_BTHV.device}"
        )
    state_BHKV = state_BHKV.to(ends_PBHKV.dtype)
    with torch.no_grad(), torch.autocast(v_BTHV.device.type, enabled=False):
        states = compose(maps_PBHKK, ends_PBHKV, state_BHKV)
    o_BTHV, last_BHKV = wkv7(*tensors, parts.take(states[:-1]), reset_BT, backend)
    return _Joined.apply(o_BTHV, last_BHKV, state_BHKV, states[-1], reads_BTHK, maps_PBHKK, parts)
