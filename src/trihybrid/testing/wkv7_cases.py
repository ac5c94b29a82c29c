"""Inputs on which kernels of WKV-7 go wrong, the exact answer to them, and the error of somebody else's answer.

A kernel that is right on random inputs alone is not right: chunks hide products of many small steps, which overflow
under strong decay and cancel where keys repeat.

Legend: B batch, T time, H heads, D width (keys and values alike).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trihybrid.ops.rates import DECAY_FLOOR
from trihybrid.ops.wkv7 import wkv7
from trihybrid.testing.compare import FLOOR

NAMES = ("o", "final", "r", "log_w", "k", "v", "a", "b", "state")
"""What `answer` returns: outputs, final state, and the gradients."""

KINDS = (
    "random",
    "slow_decay",
    "repeated_keys",
    "constant_runs",
    "zero_iclr",
    "iclr_one",
    "extreme_decay",
)
"""The cases of `make_inputs`."""

SHARP = ("repeated_keys", "constant_runs", "iclr_one")
"""Kinds in which a token is erased again and again, so that half precision inside a kernel costs more."""

RUN = 24  # mean length of a constant run
LONGEST_RECURRENCE = 2048  # tokens; beyond, the float64 chunked form answers, which is held to the recurrence


def make_inputs(
    kind: str,
    shape: tuple[int, int, int, int],
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """r, log_w, k, v, a, b [B, T, H, D] in `dtype`, and a state [B, H, D, D] in float32.

    kind, one of `KINDS`; a = -kk and b = kk iclr for a unit vector kk wherever not said otherwise:
        random: log_w over all of (-0.6065, 0), any iclr.
        slow_decay: log_w around -5e-4.
        repeated_keys: one key a head up to a thousandth, iclr above 0.97, slow decay.
        constant_runs: tokens repeat exactly, in runs of 24 on average, with a large iclr.
        zero_iclr: b = 0. iclr_one: b = kk.
        extreme_decay: every third channel at log_w = -30, every third at -1e-4, -8 mixed into the rest. RWKV-7 itself
            cannot decay like that.
    shape: (B, T, H, D).

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    generator = torch.Generator(device).manual_seed(seed)
    batch, _, heads, width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    r, k, v, key = normal(*shape), 0.5 * normal(*shape), normal(*shape), normal(*shape)
    decay = 2 * normal(*shape)
    iclr = torch.sigmoid(normal(*shape))
    if kind in ("slow_decay", "repeated_keys"):
        decay = 0.5 * decay - 7
    if kind == "repeated_keys":
        key = normal(batch, 1, heads, width) + 1e-3 * key
        k = normalize(key, dim=-1)
        iclr = torch.sigmoid(normal(*shape) + 7)
    log_w = DECAY_FLOOR * torch.sigmoid(decay)
    if kind == "constant_runs":
        starts = torch.rand(shape[1], generator=generator, device=device) < 1 / RUN
        starts[0] = True
        source = torch.cummax(torch.arange(shape[1], device=device) * starts, 0).values
        iclr = torch.sigmoid(normal(*shape) + 2)
        r, log_w, k, v, key, iclr = (x[:, source] for x in (r, log_w, k, v, key, iclr))
    elif kind == "zero_iclr":
        iclr = torch.zeros_like(iclr)
    elif kind == "iclr_one":
        iclr = torch.ones_like(iclr)
    elif kind == "extreme_decay":
        log_w = torch.where(normal(*shape) > 1, -8.0, log_w)
        log_w[..., ::3], log_w[..., 1::3] = -30.0, -1e-4
    key = normalize(key, dim=-1)
    tokens = [x.to(dtype) for x in (r, log_w, k, v, -key, key * iclr)]
    return [*tokens, normal(batch, heads, width, width)]


def make_weights(shape: tuple[int, int, int, int], like: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of o, in the dtype of `like`, and of the final state, float32, for inputs of a shape (B, T, H, D)."""
    generator = torch.Generator(like.device).manual_seed(seed)
    batch, _, heads, width = shape
    do = torch.randn(shape, generator=generator, device=like.device).to(like.dtype)
    return do, torch.randn(batch, heads, width, width, generator=generator, device=like.device)


def answer(
    inputs: Sequence[Tensor | None], reset_BT: Tensor | None, weights: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """`NAMES` in float64, of the same rounded inputs: r, log_w, k, v, a, b, and a state or None (its gradient is None
    then). By the recurrence up to 2,048 tokens, beyond that by the chunked form in float64."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    r, log_w, k, v, a, b, state = leaves
    assert r is not None and log_w is not None and k is not None and v is not None
    assert a is not None and b is not None
    backend = "reference" if r.shape[1] <= LONGEST_RECURRENCE else "chunked"
    o, final = wkv7(r, log_w, k, v, a, b, state, reset_BT, backend)
    return differentiate(o, final, leaves, weights)


def differentiate(
    o: Tensor, final: Tensor, leaves: Sequence[Tensor | None], weights: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """`NAMES` from outputs, a final state and the leaves that they came from; None in the place of a leaf None."""
    present = [x for x in leaves if x is not None]
    sums = (o, final), [w.to(x.dtype) for x, w in zip((o, final), weights, strict=True)]
    gradients = iter(torch.autograd.grad(sums[0], present, sums[1]))
    return [o.detach(), final.detach(), *(None if x is None else next(gradients) for x in leaves)]


def errors(
    got: Sequence[Tensor | None], expected: Sequence[Tensor | None], r_BTHD: Tensor
) -> dict[str, float]:
    """Relative rms errors by name, as `trihybrid.testing.relative_error`, computed where the tensors are; no entry for
    None.

    The gradient of log_w is a difference of r dr and others. Where they cancel, as for a token whose state is zero or
    has decayed to nothing, its error is relative to a tenth of r dr.
    """
    found = {}
    for name, x, reference in zip(NAMES, got, expected, strict=True):
        if x is None or reference is None:
            continue
        scale = max(reference.norm().item(), FLOOR * reference.numel() ** 0.5)
        if name == "log_w":
            dr = expected[NAMES.index("r")]
            assert dr is not None
            scale = max(scale, 0.1 * (r_BTHD.double() * dr).norm().item())
        found[name] = (x.double() - reference).norm().item() / scale
    return found
