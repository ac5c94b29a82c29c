"""The kernels of compact training beside what torch offers, forward and backward, on a GPU.

    python benchmarks/compact_kernels.py

Window attention against compiled FlexAttention with the same band: 262,144 tokens in rows of 1,024, 8 heads on 4 of
width 64.
The others against the compiled definition: the squared MLP, 131,072 tokens, 512 to 1,536 and back; sum, mix, norm and
blend of the stream, norm and rotation of heads, XSA, 262,144 tokens. bfloat16, medians.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

from trihybrid.ops.exclude_value import exclude_own_value, exclude_own_value_reference
from trihybrid.ops.mixed_norm import mixed_blend, mixed_blend_reference, mixed_norm, mixed_norm_reference
from trihybrid.ops.rotary import frequencies, normed_rotation, normed_rotation_reference, rotary_table
from trihybrid.ops.squared_mlp import squared_mlp, squared_mlp_reference
from trihybrid.ops.window_attention import window_attention


def main() -> int:
    """Print both tables."""
    torch.manual_seed(0)
    print(
        "| operator | size | forward ms | torch | backward ms | torch | ratio of both passes |\n"
        "|---|---|---|---|---|---|---|"
    )
    batch, length = 256, 1024
    q, k, v = (random(batch, length, heads, 64) for heads in (8, 4, 4))
    positions_BT = torch.arange(length, device="cuda").expand(batch, length).contiguous()
    for window in (128, 512, length):
        ours = times(lambda q, k, v, w=window: window_attention(q, k, v, positions_BT, w, 0.125), (q, k, v))
        row("window_attention", f"window {window}", ours, times(flex(window, length), (q, k, v)))
    x, up, down = random(131_072, 512), random(1536, 512, scale=0.04), random(512, 1536, scale=0.03)
    beside("squared_mlp", squared_mlp, squared_mlp_reference, (x, up, down), 0.5)
    stream = [random(batch, length, 512) for _ in range(3)] + [random(2, 512)]
    beside("mixed_norm", mixed_norm, mixed_norm_reference, stream, 0.5, 1e-6)
    shares = [random(512), random(512)]
    beside(
        "mixed_blend",
        lambda *leaves: mixed_blend(*leaves[:4], positions_BT, *leaves[4:], 0.5, 1e-6),
        lambda *leaves: mixed_blend_reference(*leaves[:4], positions_BT, *leaves[4:], 0.5, 1e-6),
        [*stream, *shares],
    )
    angles = frequencies(16, 1e4, 16, q.device, torch.float32)
    table = [part.bfloat16() for part in rotary_table(positions_BT, angles)]
    beside("normed_rotation", normed_rotation, normed_rotation_reference, (q, random(8)), *table, 1e-6)
    beside("exclude_own_value", exclude_own_value, exclude_own_value_reference, (q, v))
    return 0


def beside(
    name: str, ours: Callable[..., Any], definition: Callable[..., Any], leaves: Sequence[Tensor], *rest: Any
) -> None:
    """A row for an operator of ours and its definition, compiled; only the leaves are differentiated."""
    compiled = torch.compile(definition)
    row(
        name,
        " ".join(map(str, leaves[0].shape)),
        times(lambda *given: ours(*given, *rest), leaves),
        times(lambda *given: compiled(*given, *rest), leaves),
    )


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers that want a gradient."""
    return (torch.randn(shape, device="cuda") * scale).bfloat16().requires_grad_()


def flex(window: int, length: int) -> Callable[..., Tensor]:
    """FlexAttention over the band of a window."""
    mask = create_block_mask(
        lambda b, h, query, key: (query >= key) & (query - key < window),
        None,
        None,
        length,
        length,
        device="cuda",
    )
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(*heads_first, block_mask=mask, scale=0.125, enable_gqa=True)

    return attend


def times(call: Callable[..., Any], leaves: Sequence[Tensor]) -> tuple[float, float]:
    """Median milliseconds of the forward pass, and of the backward pass as the difference of both to it."""
    out = call(*leaves)
    grads = [torch.randn_like(part) for part in (out if isinstance(out, tuple) else (out,))]

    def both() -> None:
        torch.autograd.grad(call(*leaves), leaves, grads)

    forward = do_bench(lambda: call(*leaves), return_mode="median")
    return forward, do_bench(both, return_mode="median") - forward


def row(name: str, size: str, ours: tuple[float, float], peer: tuple[float, float]) -> None:
    """One line of the table."""
    cells = [name, size, *(f"{x:.3f}" for pair in zip(ours, peer, strict=True) for x in pair)]
    print(f"| {' | '.join(cells)} | {sum(peer) / sum(ours):.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
