"""Sliding-window attention, forward and backward: time and memory by length, beside attention with a dense mask.

    python benchmarks/sliding_gradient.py [--lengths 2048,4096,8192,16384] [--width 256] [--heads 8] [--groups 1]
        [--window 512] [--flex] [--json FOLDER]

One row of tokens, one document. On a GPU bfloat16, elsewhere float32 (and smaller by default). The peer is what
transformers does: keys and values repeated for all heads, and `scaled_dot_product_attention` with a mask of T x T;
--flex adds compiled FlexAttention. Times are medians, memory is the most that one step takes beside its inputs: as
the allocator counts it on a GPU, the tensors that operators make elsewhere. Errors are the worst of the output and
the three gradients at the shortest length, against float64. --json writes the rows as sliding_gradient.json into
FOLDER. Exits with 1 when a target is missed: time and memory that at most double with the length (10 % are let go),
and on a GPU 6 times the peer's speed at 16,384 tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trihybrid.ops.backend import backends
from trihybrid.ops.sliding_attention import OPERATOR, Documents, sliding_attention
from trihybrid.testing import relative_error
from trihybrid.testing.live import peak_bytes

Row = dict[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

PEER = "dense mask, SDPA"
DOUBLING, SPEED, SPEED_LENGTH = 2.2, 6.0, 16384
REPEATS = 7
SETTLED = 2  # the doubling is held to lengths of at least so many times the shortest, whose launches weigh


def main() -> int:
    """Measure, print the table, and return the exit code."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Gradients of sliding-window attention.")
    parser.add_argument("--lengths", default="2048,4096,8192,16384" if gpu else "512,1024,2048")
    parser.add_argument("--width", type=int, default=256 if gpu else 32)
    parser.add_argument("--heads", type=int, default=8 if gpu else 2)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--window", type=int, default=512 if gpu else 64)
    parser.add_argument("--flex", action="store_true", help="FlexAttention too (GPUs only)")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    lengths = sorted(int(length) for length in arguments.lengths.split(","))
    device = torch.device("cuda" if gpu else "cpu")
    rows = [
        row for length in lengths for row in measure(length, arguments, device, errors=length == lengths[0])
    ]
    print(f"{torch.cuda.get_device_name() if gpu else 'CPU'}, torch {torch.__version__}")
    table(rows)
    if arguments.json is not None:
        arguments.json.mkdir(parents=True, exist_ok=True)
        (arguments.json / "sliding_gradient.json").write_text(json.dumps(rows, indent=2) + "\n")
    missed = list(targets(rows, gpu))
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


def measure(length: int, arguments: argparse.Namespace, device: torch.device, errors: bool) -> Iterator[Row]:
    """A row for the peer and for each of our backends that runs here."""
    heads, groups, width, window = arguments.heads, arguments.groups, arguments.width, arguments.window
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(length)
    inputs = [
        torch.randn(1, length, count, width, generator=generator).to(device, dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]
    slope_BTHD = torch.randn(1, length, heads, width, generator=generator).to(device, dtype)
    documents = Documents(torch.arange(length, device=device)[None], borders=False)
    scale = width**-0.5

    def ours(name: str) -> Attention:
        return lambda q, k, v: sliding_attention(q, k, v, documents, window, scale, name)

    ways: dict[str, Attention] = {PEER: peer(length, window, scale, device)}
    if arguments.flex:
        ways["FlexAttention"] = flex(length, window, scale, device)
    for backend in backends(OPERATOR):
        fits = backend.takes is None or backend.takes(width, dtype) is None
        if backend.name != "dense" and backend.available(device) is None and fits:
            ways[backend.name] = ours(backend.name)
    exact = (
        differentiate(ours("dense"), [x.detach().double() for x in inputs], slope_BTHD.double())
        if errors
        else None
    )
    for name, way in ways.items():
        row: Row = {
            "benchmark": "sliding_gradient", "way": name, "length": length, "heads": heads, "groups": groups,
            "width": width, "window": window, "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        try:
            found = differentiate(way, inputs, slope_BTHD)
            if exact is not None:
                row["error"] = max(relative_error(x.double(), y) for x, y in zip(found, exact, strict=True))
            del found
            row["ms"] = milliseconds(lambda: differentiate(way, inputs, slope_BTHD), device)  # noqa: B023
            row["peak_bytes"] = peak_bytes(lambda: differentiate(way, inputs, slope_BTHD))  # noqa: B023
        except Exception as problem:  # a way that fails is a row that says so
            row["failed"] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
        yield row


def differentiate(way: Attention, inputs: list[Tensor], slope_BTHD: Tensor) -> list[Tensor]:
    """Output and gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = way(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, slope_BTHD)]


def peer(length: int, window: int, scale: float, device: torch.device) -> Attention:
    """transformers' `sdpa`: the mask of the model, made once a forward pass for all its layers."""
    place_T = torch.arange(length, device=device)
    distance_TS = place_T[:, None] - place_T
    visible_11TS = ((distance_TS >= 0) & (distance_TS < window))[None, None]

    def attend(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        repeats = q_BTHD.shape[2] // k_BTGD.shape[2]
        keys, values = (x.transpose(1, 2).repeat_interleave(repeats, 1) for x in (k_BTGD, v_BTGD))
        o_BHTD = F.scaled_dot_product_attention(
            q_BTHD.transpose(1, 2), keys, values, attn_mask=visible_11TS, scale=scale
        )
        return o_BHTD.transpose(1, 2)

    return attend


def flex(length: int, window: int, scale: float, device: torch.device) -> Attention:
    """Compiled FlexAttention with a mask of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    blocks = create_block_mask(visible, None, None, length, length, device=str(device))

    def attend(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        q_BHTD, k_BGTD, v_BGTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
        o_BHTD = compiled(q_BHTD, k_BGTD, v_BGTD, block_mask=blocks, scale=scale, enable_gqa=True)
        return o_BHTD.transpose(1, 2)

    return attend


def milliseconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after one that does not count."""
    function()
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def table(rows: list[Row]) -> None:
    """One line a row, with how many times faster than the peer it is."""
    print("| tokens | way | ms | times the peer's speed | peak MiB | error |\n|---|---|---|---|---|---|")
    for row in rows:
        if "failed" in row:
            print(f"| {row['length']:,} | {row['way']} | {row['failed']} | | | |")
            continue
        error = f"{row['error']:.1e}" if "error" in row else ""
        print(
            f"| {row['length']:,} | {row['way']} | {row['ms']:.2f} | {ratio(rows, row):.1f} | "
            f"{row['peak_bytes'] / 2**20:.0f} | {error} |"
        )


def ratio(rows: list[Row], row: Row) -> float:
    """How many times faster than the peer at the same length; 0 where the peer failed."""
    times = [r["ms"] for r in rows if r["way"] == PEER and r["length"] == row["length"] and "ms" in r]
    return times[0] / row["ms"] if times else 0.0


def targets(rows: list[Row], gpu: bool) -> Iterator[str]:
    """A line for every target that is missed. Times are held to on a GPU only: a shared CPU has others to serve."""
    ours = [row for row in rows if row["way"] not in (PEER, "FlexAttention")]
    yield from (f"{row['way']} at {row['length']:,}: {row['failed']}" for row in ours if "failed" in row)
    ours = [row for row in ours if "failed" not in row]
    shortest = min(row["length"] for row in rows)
    for row in ours:
        half = [r for r in ours if r["way"] == row["way"] and 2 * r["length"] == row["length"]]
        if not half or half[0]["length"] < SETTLED * shortest:
            continue
        for name in ("ms", "peak_bytes") if gpu else ("peak_bytes",):
            grown = row[name] / half[0][name]
            if grown > DOUBLING:
                yield f"{row['way']}: {name} grows {grown:.2f} times to {row['length']:,} tokens, at most {DOUBLING}"
    best = max((ratio(rows, row) for row in ours if row["length"] == SPEED_LENGTH), default=SPEED)
    if gpu and best < SPEED:
        yield f"{best:.1f} times the peer's speed at {SPEED_LENGTH:,} tokens, the target is {SPEED}"


if __name__ == "__main__":
    sys.exit(main())
