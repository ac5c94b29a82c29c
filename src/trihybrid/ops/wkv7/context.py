"""WKV-7 over one sequence that lies on several devices, each with a contiguous part of it (context parallelism).

Shapes: B batch, T time (of this process's part), H heads, K key width, V value width. `parts` holds the maths.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from trihybrid.ops.ranks import Ranks
from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.parts import wkv7_parts


@torch.compiler.disable
def wkv7_context(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` over a sequence whose part p, one after the other, lies on rank p of a group; every rank calls this.

    r_BTHK .. b_BTHK, reset_BT: this rank's tokens, at least one; the parts may differ in length, and in whether they
        have a reset_BT. Everything else agrees: B, H, K, V, dtypes, and what requires a gradient.
    state_BHKV: S_0 of the whole sequence, equal on all ranks, or None for zeros on all.
    group: of torch.distributed; None for the default group. A group of one is `wkv7` itself.

    Returns (o_BTHV of this rank's tokens, S of the end of the whole sequence, to the bit the same on every rank).

    Gradients: the loss is the sum over the ranks of each rank's loss, in which a rank's own outputs and the final state
    may occur. Those of r .. b are complete on the rank that holds the tokens; those of weights that all ranks share
    are then to be summed over the group. That of S_0 is complete, and the same to the bit, on every rank: to sum it as
    well would count it once for each rank; leave it, or average it.
    The backward exchanges too, so every rank has to run it: a rank without a loss of its own adds 0 * o.sum().
    Twice differentiating it is a RuntimeError.

    Exchanged, 4 bytes a number (8 in float64): forward, B H K (K + V) from each rank to all; backward, B H K V from
    each to all, and a sum of B H K V. None of it grows with time. The work is in `parts`.

    ValueErrors as in `wkv7`, and for a process without a default group or outside of `group`. One that not every rank
    raises leaves the others waiting.
    """
    if not dist.is_initialized():
        raise ValueError(
            "group: torch.distributed has no process group; start one, or call wkv7 in a single process"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"group: process {dist.get_rank()} is not in it; only its members may call wkv7_context"
        )
    tensors = (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    part = Ranks(dist.get_rank(group), dist.get_world_size(group), group)
    if part.count == 1:
        return wkv7(*tensors, state_BHKV, reset_BT, backend)
    return wkv7_parts(*tensors, state_BHKV, reset_BT, part, backend)
