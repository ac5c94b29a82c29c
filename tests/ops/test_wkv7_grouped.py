"""WKV-7 with keys and values that groups of heads share, against one head at a time."""

import pytest
import torch

from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.grouped import wkv7_grouped
from trihybrid.testing import relative_error

NAMES = ("r_BTHK", "log_w_BTHK", "k_BTGK", "v_BTGV", "kk_BTGK", "iclr_BTHK", "state_BHKV")


def make(dtype=torch.float64, batch=2, time=9, heads=4, groups=2, keys=3, values=5):
    r, log_w, iclr = (torch.randn(batch, time, heads, keys, dtype=dtype) for _ in range(3))
    k, kk = (torch.randn(batch, time, groups, keys, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, time, groups, values, dtype=dtype)
    state = torch.randn(batch, heads, keys, values, dtype=dtype)
    kk = torch.nn.functional.normalize(kk, dim=-1)
    return [r, -0.6 * log_w.sigmoid(), k, v, kk, iclr.sigmoid(), state]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_each_head_reads_its_group(groups: int, backend: str) -> None:
    inputs = [x.requires_grad_() for x in make(groups=groups)]
    r, log_w, k, v, kk, iclr, state = inputs
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 4] = reset[1, 0] = True
    o, final = wkv7_grouped(*inputs, reset, backend)
    heads = []
    for head in range(4):
        own, shared = slice(head, head + 1), slice(head * groups // 4, head * groups // 4 + 1)
        unit, rate = kk[:, :, shared], iclr[:, :, own]
        key = k[:, :, shared] * (1 - torch.exp(log_w[:, :, own]) + rate)
        tokens = (r[:, :, own], log_w[:, :, own], key, v[:, :, shared], -unit, unit * rate)
        heads.append(wkv7(*tokens, state[:, own], reset, "reference"))
    expected = torch.cat([o for o, _ in heads], 2), torch.cat([s for _, s in heads], 1)
    weights = [torch.randn_like(x) for x in expected]
    found = torch.autograd.grad((o, final), inputs, weights)
    wanted = torch.autograd.grad(expected, inputs, weights)
    for x, y in zip((o, final, *found), (*expected, *wanted), strict=True):
        assert relative_error(x, y) <= 1e-10


def test_half_precision_is_widened_before_it_is_multiplied() -> None:
    inputs = [x.bfloat16() for x in make(torch.float32)[:6]]
    o, final = wkv7_grouped(*inputs)
    exact, state = wkv7_grouped(*(x.double() for x in inputs))
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert relative_error(o, exact) <= 4e-3
    assert relative_error(final, state) <= 1e-5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("v_BTGV", torch.zeros(2, 9, 3, 5), "groups divide the heads"),
        ("k_BTGK", torch.zeros(2, 9, 4, 3), "k_BTGK has shape .2, 9, 4, 3.; expected .2, 9, 2, 3"),
        ("kk_BTGK", torch.zeros(2, 9, 2, 4), "kk_BTGK has shape .2, 9, 2, 4.; expected .2, 9, 2, 3"),
        ("iclr_BTHK", torch.zeros(2, 9, 2, 3), "iclr_BTHK has shape .2, 9, 2, 3.; expected .2, 9, 4, 3"),
        ("iclr_BTHK", torch.zeros(2, 9, 4, 3, dtype=torch.float64), "iclr_BTHK has dtype torch.float64"),
        ("state_BHKV", torch.zeros(2, 2, 3, 5), "state_BHKV has shape .2, 2, 3, 5.; expected .2, 4, 3, 5"),
        ("reset_BT", torch.zeros(2, 9), "reset_BT has dtype torch.float32; expected torch.bool"),
        ("backend", "magic", "'wkv7' has no backend 'magic'"),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, message: str) -> None:
    arguments: dict = dict(zip(NAMES, make(torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        wkv7_grouped(**{**arguments, name: value})
