"""fla-core's kernels of the recurrence (`chunk_rwkv7`), for those who ask for them by name; never chosen unasked.

In their default mode, with all arguments in the dtype of v, as `benchmarks/wkv7_gpu.py` has measured them. The faster
modes of 0.6.0 are wrong where keys repeat, and are not offered.

Shapes: B batch, T time, H heads, K key width, V value width, N documents.
"""

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

logger = logging.getLogger(__name__)

OFF = "outputs are 0.04 off where keys repeat, eight times what the backend triton is"
MEASURED = {
    "0.4.1": f"{OFF}; its issues 906 and 1080 report rows left unwritten and an overflow past 65,536 tokens",
    "0.6.0": OFF,
}
"""Version -> what is known of it."""


def fla_available(device: torch.device) -> str | None:
    """None on a GPU with fla-core, else what is missing."""
    if device.type != "cuda":
        return "its kernels are for GPUs"
    try:
        importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        return "fla-core is not installed; pip install 'trihybrid[fla]'"
    return None


def fla_takes(key_width: int, value_width: int, dtype: torch.dtype) -> str | None:
    """None for this dtype of v, else why it is not taken."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"v is {dtype}; fla-core takes bfloat16 and float16"
    return None


@torch.compiler.disable
def wkv7_fla(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `wkv7`, with v in half precision and the others rounded to its dtype; the state is float32. What is known of
    the installed version is logged as a warning, once. Where documents begin has to be known on the host: with `reset`
    a call waits for the device, and no CUDA graph can record it."""
    _warn()
    function = importlib.import_module("fla.ops.rwkv7").chunk_rwkv7
    tokens = [x.to(v_BTHV.dtype) for x in (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)]
    return in_fla_terms(function, tokens, None if state_BHKV is None else state_BHKV.float(), reset_BT)


def in_fla_terms(
    function: Callable[..., tuple[Tensor, Tensor]],
    tokens: Sequence[Tensor],
    state_BHKV: Tensor | None,
    reset_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` by a `chunk_rwkv7` of any version and mode; `tokens` are r, log_w, k, v, a and b."""
    if reset_BT is None:
        return function(*tokens, scale=1.0, initial_state=state_BHKV, output_final_state=True)
    # All rows as one: a document begins at each reset, and where a row begins.
    batch, length = reset_BT.shape
    begins_BT = reset_BT.clone()
    begins_BT[:, 0] = True
    starts_N = begins_BT.flatten().nonzero().flatten()
    counts_B = begins_BT.sum(1)
    behind_B = counts_B.cumsum(0)
    state_NHKV = None
    if state_BHKV is not None:
        state_BHKV = state_BHKV.masked_fill(reset_BT[:, 0, None, None, None], 0.0)
        state_NHKV = state_BHKV.new_zeros(len(starts_N), *state_BHKV.shape[1:])
        state_NHKV = state_NHKV.index_copy(0, behind_B - counts_B, state_BHKV)
    o_1XHV, last_NHKV = function(
        *(x.flatten(0, 1)[None] for x in tokens),
        scale=1.0,
        initial_state=state_NHKV,
        output_final_state=True,
        cu_seqlens=pad(starts_N, (0, 1), value=batch * length),
    )
    return o_1XHV.unflatten(1, (batch, length))[0], last_NHKV[behind_B - 1]


@cache
def _warn() -> None:
    version = importlib.metadata.version("fla-core")
    known = MEASURED.get(version, "which nobody has measured here")
    logger.warning("backend fla of wkv7 is fla-core %s: %s", version, known)
