"""The place of the package's Triton kernels of WKV-7 in an exported folder: those of an installed trihybrid.

A folder carries the definition and the chunked form, which run wherever torch does. Where trihybrid is installed, its
kernels are one backend more, chosen as the package itself chooses.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

KERNELS = "trihybrid.ops.wkv7.triton"


def available(device: torch.device) -> str | None:
    """None where trihybrid is installed and its kernels run on the device, else the reason why not."""
    if importlib.util.find_spec("trihybrid") is None:
        return "they are trihybrid's, which is not installed"
    try:
        installed = _installed()
        for name in ("wkv7_triton", "wkv7_triton_grouped"):
            getattr(installed, name)
        return installed.available(device)
    except (ImportError, AttributeError) as error:
        return f"the installed trihybrid has no such kernels ({error})"


def takes(key_width: int, value_width: int, dtype: torch.dtype) -> str | None:
    """None for these widths and this dtype of v, else why the kernels do not take them."""
    return _installed().takes(key_width, value_width, dtype)


def wkv7_triton(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The installed kernels; shapes and meaning are those of `wkv7`."""
    return _installed().wkv7_triton(r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV, reset_BT)


def wkv7_triton_grouped(
    r_BTHK: Tensor,
    log_w_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    kk_BTGK: Tensor,
    iclr_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    reset_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The installed kernels; shapes and meaning are those of `wkv7_grouped`."""
    tokens = (r_BTHK, log_w_BTHK, k_BTGK, v_BTGV, kk_BTGK, iclr_BTHK)
    return _installed().wkv7_triton_grouped(*tokens, state_BHKV, reset_BT)


def _installed() -> ModuleType:
    return importlib.import_module(KERNELS)
