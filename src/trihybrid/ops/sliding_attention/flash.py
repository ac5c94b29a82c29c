"""torch's FlashAttention kernels, which know windows and documents of any length: half precision on a GPU.

`scaled_dot_product_attention` does not hand a window to them, and torch 2.11's `varlen_attn` no grouped heads; the
operator below both takes the two, with its gradient.

Legend: B batch, T time, S keys, H query heads, G key/value heads, D head width.
"""

import torch
from torch import Tensor

from trihybrid.ops.sliding_attention.documents import Documents

WIDEST = 256
AMPERE = (8, 0)


def no_flash(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, None where they can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has no FlashAttention"
    found = torch.cuda.get_device_capability(device)
    return None if found >= AMPERE else f"needs compute capability {AMPERE}, the device has {found}"


def takes_flash(width: int, dtype: torch.dtype) -> str | None:
    """Why a call cannot go to the kernels, None when it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention takes half precision, not {dtype}"
    if width % 8 or width > WIDEST:
        return f"FlashAttention takes head widths in multiples of 8 up to {WIDEST}, not {width}"
    return None


def flash(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, documents: Documents, window: int, scale: float
) -> Tensor:
    """All rows as one, cut at the documents' borders."""
    starts_N, longest = documents.packing
    output_XHD, *_ = torch.ops.aten._flash_attention_forward(
        q_BTHD.flatten(0, 1), k_BTGD.flatten(0, 1), v_BTGD.flatten(0, 1),
        starts_N, starts_N, longest, longest, 0.0, False, False,
        scale=scale, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return output_XHD.unflatten(0, q_BTHD.shape[:2])


def flash_end(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, window: int, scale: float) -> Tensor:
    """[B, T, H, D] of the last T of S tokens, each over the `window` tokens that end with itself.

    Args:
        q_BTHD: queries, half precision; head h reads h // (H / G).
        k_BSGD, v_BSGD: keys and values, oldest first, S >= T.
        window, scale: as in `sliding_attention`.
    """
    output_BTHD, *_ = torch.ops.aten._flash_attention_forward(
        q_BTHD, k_BSGD, v_BSGD, None, None, q_BTHD.shape[1], k_BSGD.shape[1], 0.0, False, False,
        scale=scale, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return output_BTHD
