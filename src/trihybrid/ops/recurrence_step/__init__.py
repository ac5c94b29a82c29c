"""All that stands between the products of an RWKV-7 mixer in a decoding step, as one launch; see `mixers.rwkv7`.

    r, k normed a head;  log W = -exp(-1/2) sigmoid(w0 + decay);  a = sigmoid(a0 + iclr);  kk = k / |k|
    k <- k (1 - W + a), or k (1.5 - log sigmoid(w0 + decay) + a)
    S <- diag(W) S + (kk a) (-kk^T S) + k v^T;   o = (S^T r / sqrt(N) + bonus) gate

Bound by the bytes of the state, which is read and written once. The kernel of `triton` keeps float32 throughout; where
it does not fit, these are torch's operators around `ops.wkv7.decode`.

Legend: B sequences, H heads, G key/value heads, N head width, C = H N channels, P columns of the projections.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from trihybrid.ops.decode_product import Gain
from trihybrid.ops.rates import rates_reference
from trihybrid.ops.wkv7.decode import wkv7_step_

__all__ = ["WIDEST", "Recurrence", "fits", "recurrence_step"]

WIDEST = 256  # a program holds whole columns of the state, in registers


@dataclass(frozen=True)
class Recurrence:
    """What stays the same from step to step.

    Attributes:
        heads, groups, width: H, G, N.
        w0, a0: [C], offsets of decay and iclr.
        r_gain, k_gain: norms [N] with weights, both or none.
        by_decay: how keys are scaled, see above.
        bonus: r_k [H, N]: o gets (sum_n r k r_k) v, with the scaled k; None for none.
    """

    heads: int
    groups: int
    width: int
    w0: Tensor
    a0: Tensor
    r_gain: Gain | None
    k_gain: Gain | None
    by_decay: bool
    bonus: Tensor | None

    @property
    def channels(self) -> int:
        """C."""
        return self.heads * self.width


def fits(x_BP: Tensor, state_BHNN: Tensor) -> bool:
    """Whether the kernel takes these: a GPU, half precision, a float32 state of heads at most WIDEST wide."""
    half = x_BP.dtype in (torch.bfloat16, torch.float16)
    kinds = half and state_BHNN.dtype == torch.float32
    return x_BP.is_cuda and kinds and state_BHNN.shape[-1] <= WIDEST


def recurrence_step(
    x_BP: Tensor, raised_BP: Tensor, recurrence: Recurrence, state_BHNN: Tensor, o_BC: Tensor
) -> None:
    """Let the state read one token, in place, and write what it reads, gated, to o_BC.

    Args:
        x_BP: rows that begin with r [C], k [G N] and v [G N], before their norms.
        raised_BP: rows that begin with what is added to the offsets of iclr and decay, and the gate, each [C].
        state_BHNN: dense in [H, N, N].
        o_BC: dense in C.
    """
    if fits(x_BP, state_BHNN):
        from trihybrid.ops.recurrence_step.triton import launch

        launch(x_BP, raised_BP, recurrence, state_BHNN, o_BC)
        return
    heads, groups, width = recurrence.heads, recurrence.groups, recurrence.width
    channels, shared, kind = recurrence.channels, groups * width, state_BHNN.dtype
    r_BHN = x_BP[:, :channels].unflatten(-1, (heads, width))
    k_BGN, v_BGN = (
        part.unflatten(-1, (groups, width)) for part in x_BP[:, channels : channels + 2 * shared].chunk(2, -1)
    )
    if recurrence.r_gain is not None and recurrence.k_gain is not None:
        r_BHN, k_BGN = recurrence.r_gain(r_BHN), recurrence.k_gain(k_BGN)
    k_BHN, v_BHN = (x.repeat_interleave(heads // groups, 1).to(kind) for x in (k_BGN, v_BGN))
    iclr_BC, decay_BC, gate_BC = raised_BP[:, : 3 * channels].chunk(3, -1)
    w0_C, a0_C, decay_BC, iclr_BC = (x.to(kind) for x in (recurrence.w0, recurrence.a0, decay_BC, iclr_BC))
    log_w_BHN, a_BHN = (
        x.unflatten(-1, (heads, width)) for x in rates_reference(decay_BC, iclr_BC, w0_C, a0_C)
    )
    kk_BHN = normalize(k_BHN, dim=-1, eps=1e-12)
    if recurrence.by_decay:
        lost_BHN = 1 - log_w_BHN.exp()
    else:
        lost_BHN = 1.5 - logsigmoid(w0_C + decay_BC).unflatten(-1, (heads, width))
    k_BHN = k_BHN * (lost_BHN + a_BHN)
    r_BHN = r_BHN.to(kind)
    removed_BHN = kk_BHN * a_BHN
    read_BHN = wkv7_step_(
        r_BHN[:, None], log_w_BHN[:, None], k_BHN[:, None], v_BHN[:, None], -kk_BHN[:, None], removed_BHN[:, None],
        state_BHNN,
    )[:, 0] * width**-0.5  # fmt: skip
    if recurrence.bonus is not None:
        read_BHN = read_BHN + (r_BHN * k_BHN * recurrence.bonus).sum(-1, keepdim=True) * v_BHN
    o_BC.copy_(read_BHN.flatten(1) * gate_BC)
