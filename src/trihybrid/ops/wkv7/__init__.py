"""WKV-7, the recurrence of RWKV-7: state S in [K, V], a diagonal decay and one rank-one correction for each token.

Shapes: B batch, T time, H heads, K key width, V value width.
"""

import torch

from trihybrid.ops.backend import Backend, choose, choose_for, register
from trihybrid.ops.wkv7.chunked import wkv7_chunked
from trihybrid.ops.wkv7.fla import fla_available, fla_takes, wkv7_fla
from trihybrid.ops.wkv7.reference import wkv7_reference
from trihybrid.ops.wkv7.triton import available, takes, wkv7_triton

__all__ = ["wkv7", "wkv7_chunked", "wkv7_fla", "wkv7_reference", "wkv7_triton"]


def _anywhere(device: torch.device) -> str | None:
    return None


register(Backend("wkv7", "reference", wkv7_reference, _anywhere, priority=0))
register(Backend("wkv7", "chunked", wkv7_chunked, _anywhere, priority=10))
register(Backend("wkv7", "triton", wkv7_triton, available, priority=20, takes=takes))
register(Backend("wkv7", "fla", wkv7_fla, fla_available, priority=0, takes=fla_takes, foreign=True))


def wkv7(
    r_BTHK: torch.Tensor,
    log_w_BTHK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    a_BTHK: torch.Tensor,
    b_BTHK: torch.Tensor,
    state_BHKV: torch.Tensor | None = None,
    reset_BT: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The WKV-7 recurrence (RWKV-7 "Goose", arXiv 2503.14456), for every head and t = 1 .. T:

        u_t = S_{t-1}^T a_t
        S_t = diag(exp(log_w_t)) S_{t-1} + b_t u_t^T + k_t v_t^T
        o_t = S_t^T r_t

    The output uses the updated state, and nothing is scaled. In RWKV-7, a = -kk and b = kk * iclr for a unit vector kk,
    and log_w lies in (-0.6065, 0).

    r_BTHK, log_w_BTHK, k_BTHK, a_BTHK, b_BTHK, v_BTHV: floating point; K and V may differ, T >= 1.
    state_BHKV: S_0, or None for zeros.
    reset_BT: bool, True at the first token of a document, where the state that enters is zero (S_0 too, at t = 1) and
        log_w acts on nothing; None for no resets.
    backend: "reference", "chunked", "triton", "fla" (fla-core's kernels, see `wkv7.fla`), or None for the best one
        on the device.

    Computed in float64 when v is float64, else in float32, outside of autocast; "triton", which takes v in half
    precision alone, multiplies float16 and adds up in float32, "fla" multiplies in v's half precision.
    Returns (o_BTHV in the dtype of v, state_BHKV = S_T in the dtype of the computation).
    ValueError, naming the argument, for a wrong shape, dtype or device, and for an unknown backend.
    """
    if r_BTHK.dim() != 4 or v_BTHV.dim() != 4 or 0 in r_BTHK.shape or 0 in v_BTHV.shape:
        raise ValueError(
            f"r_BTHK has shape {tuple(r_BTHK.shape)} and v_BTHV {tuple(v_BTHV.shape)}; expected (batch, time, heads, "
            "width) for both, with every size at least 1"
        )
    batch, time, heads, key_width = r_BTHK.shape
    value_width = v_BTHV.shape[-1]
    compute = torch.float64 if v_BTHV.dtype == torch.float64 else torch.float32
    state_shape = (batch, heads, key_width, value_width)
    check(
        v_BTHV,
        reset_BT,
        r_BTHK=(r_BTHK, r_BTHK.shape),
        log_w_BTHK=(log_w_BTHK, r_BTHK.shape),
        k_BTHK=(k_BTHK, r_BTHK.shape),
        v_BTHV=(v_BTHV, (batch, time, heads, value_width)),
        a_BTHK=(a_BTHK, r_BTHK.shape),
        b_BTHK=(b_BTHK, r_BTHK.shape),
        state_BHKV=(state_BHKV, state_shape),
    )
    tokens = (r_BTHK, log_w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK)
    name = chosen(backend, v_BTHV.device.type, key_width, value_width, v_BTHV.dtype)
    if name == "triton":
        return wkv7_triton(*tokens, state_BHKV, reset_BT)
    if name == "fla":
        return wkv7_fla(*tokens, state_BHKV, reset_BT)
    if state_BHKV is None:
        state_BHKV = v_BTHV.new_zeros(state_shape, dtype=compute)
    return _widened(name, compute, (*tokens, state_BHKV), reset_BT)


# A constant to the compiler, which cannot follow a registry.
@torch.compiler.assume_constant_result
def chosen(name: str | None, device_type: str, key_width: int, value_width: int, dtype: torch.dtype) -> str:
    """The name of the backend that works on these widths and this dtype of v; ValueErrors are those of `choose_for`."""
    return choose_for("wkv7", name, torch.device(device_type), key_width, value_width, dtype).name


# The compiler would unroll the loops over chunks.
@torch.compiler.disable
def _widened(
    name: str, compute: torch.dtype, tensors: tuple[torch.Tensor, ...], reset_BT: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A backend that computes in one dtype, on tensors of that dtype."""
    v_BTHV = tensors[3]
    function = choose("wkv7", name, v_BTHV.device).function
    with torch.autocast(v_BTHV.device.type, enabled=False):
        o_BTHV, state_BHKV = function(*(x.to(compute) for x in tensors), reset_BT)
    return o_BTHV.to(v_BTHV.dtype), state_BHKV


def check(
    v: torch.Tensor, reset_BT: torch.Tensor | None, **expected: tuple[torch.Tensor | None, tuple[int, ...]]
) -> None:
    """ValueError, naming the argument, unless every tensor, None apart, has its expected shape, the device of v and a
    dtype that goes with v's, and `reset_BT` is one bool a token.

    expected: by the argument's name, the tensor and its shape.
    """
    wide = v.dtype == torch.float64
    for name, (x, shape) in expected.items():
        if x is None:
            continue
        _check_place(name, x, shape, v.device)
        if not x.dtype.is_floating_point or (x.dtype == torch.float64 and not wide):
            raise ValueError(
                f"{name} has dtype {x.dtype}; expected a floating point dtype, and float64 only when v is float64"
            )
    if reset_BT is not None:
        _check_place("reset_BT", reset_BT, tuple(v.shape[:2]), v.device)
        if reset_BT.dtype != torch.bool:
            raise ValueError(f"reset_BT has dtype {reset_BT.dtype}; expected torch.bool")


def _check_place(name: str, x: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device}, the device of v")
