"""How a wide attention head becomes several narrow recurrence heads.

A global layer of the teacher has Q query heads and G key/value heads of D channels. The student has D / N blocks of N
channels for each: R = Q / G query heads read one key/value head. Student key/value head g J + j (J = D / N blocks) is
block j of teacher head g; student query head (g J + j) R + i is block j of teacher query head g R + i, so that
`repeat_interleave` joins each query block with its own key block. Channels of queries and keys are first put in an
order that keeps rotary pairs in one block; values and outputs are not. With J = 1 all this is the identity: heads map
one to one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Numbers of a teacher's global attention: query heads, key/value heads, channels a head, channels of a student
    head, rotary pairs a head, and whether blocks are permuted or taken plainly."""

    query: int
    groups: int
    width: int
    narrow: int
    rotary_pairs: int
    permuted: bool = True

    @property
    def blocks(self) -> int:
        return self.width // self.narrow

    def channel_order(self) -> Tensor:
        """[D] channel of the teacher's head for each channel of the student's blocks: rotary pairs (c, c + D/2) first,
        as many as fill a block at a time, of those first halves then second halves; then the rest in order. Plain order
        where blocks are plain or there is one."""
        channels = torch.arange(self.width)
        if not self.permuted or self.blocks == 1:
            return channels
        half = self.width // 2
        parts = channels[: self.rotary_pairs].split(self.narrow // 2)
        rotary = torch.cat([torch.cat([part, half + part]) for part in parts])
        rest = torch.cat([channels[self.rotary_pairs : half], channels[half + self.rotary_pairs :]])
        return torch.cat([rotary, rest])

    def query_rows(self, ordered: bool = True) -> Tensor:
        """[Q D] row of the teacher's q_proj (column of o_proj with `ordered` False) for each row of the student's."""
        order = self.channel_order() if ordered else torch.arange(self.width)
        rows_QD = torch.arange(self.query)[:, None] * self.width + order
        if not self.permuted:
            return rows_QD.flatten()
        rows_GRJN = rows_QD.view(self.groups, self.query // self.groups, self.blocks, self.narrow)
        return rows_GRJN.permute(0, 2, 1, 3).flatten()

    def key_rows(self, ordered: bool = True) -> Tensor:
        """[G D] row of the teacher's k_proj (of v_proj with `ordered` False) for each row of the student's."""
        order = self.channel_order() if ordered else torch.arange(self.width)
        return (torch.arange(self.groups)[:, None] * self.width + order).flatten()


def fold_norm(weight: Tensor, norm: Tensor, heads: int) -> tuple[Tensor, float]:
    """A projection [heads D, C] or its bias [heads D] with the teacher's per-channel norm weight [D] folded into its
    rows, relative to the root mean square of that weight, and this rms. The student's norm is one weight for all
    blocks, so it can take only the rms; the rows carry what differs between the blocks."""
    rms = norm.double().pow(2).mean().sqrt()
    factor = (norm.double() / rms).repeat(heads)
    return (weight.double().T * factor).T.to(weight.dtype), float(rms)


def ridge_regression(x_TC: Tensor, y_TK: Tensor, penalty: float) -> Tensor:
    """W [K, C] that minimises |x W^T - y|^2 + penalty * tr(x^T x) / C * |W|^2, solved in float64."""
    x, y = x_TC.double(), y_TK.double()
    gram = x.T @ x
    gram += penalty * gram.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(gram, x.T @ y).T


def rms(x: Tensor) -> float:
    """Root mean square of all elements, in float64."""
    return float(x.double().pow(2).mean().sqrt())
