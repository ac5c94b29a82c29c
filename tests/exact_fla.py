"""What fla-core's `chunk_rwkv7` is to compute, document by document: a stand-in that needs no GPU."""

from itertools import pairwise

import torch

from trihybrid.ops.wkv7 import wkv7


def chunk_rwkv7(
    r, w, k, v, a, b, scale, initial_state=None, output_final_state=False, cu_seqlens=None, **modes
):
    """o, and the state of each document; `modes` are how fla-core may compute it, and change nothing here."""
    assert scale == 1.0 and output_final_state
    if cu_seqlens is None:
        return wkv7(r, w, k, v, a, b, initial_state, backend="reference")
    outputs, states = [], []
    for number, (start, end) in enumerate(pairwise(cu_seqlens)):
        state = None if initial_state is None else initial_state[number : number + 1]
        o, last = wkv7(*(x[:, start:end] for x in (r, w, k, v, a, b)), state, backend="reference")
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 1), torch.cat(states)
