"""WKV-7 over a sequence that lies on two GPUs, half on each, beside the same on one: errors, time, memory.

    python benchmarks/wkv7_two_gpus.py [--lengths 4096,131072] [--heads 32] [--tiny] [--json FOLDER]

torchrun starts two processes. bfloat16, B = 1, D = 128, forward and backward with an initial state, so that outputs,
final state and all gradients count. Errors are relative and rms, the worst of them, against float64's chunked form over
2 heads and 8,192 tokens, on all inputs of `trihybrid.testing.wkv7_cases`; "apart" is the largest between two GPUs and
one. Times are medians by the clock, both GPUs idle before and after. --tiny runs it in small on CPUs (gloo, float32,
the chunked form). --json writes the rows as wkv7_two_gpus.json into FOLDER. The exit code is 1 where two GPUs are
further from the truth than twice what one is, and than 1e-5.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.context import wkv7_context
from trihybrid.testing.wkv7_cases import (
    KINDS,
    NAMES,
    answer,
    differentiate,
    errors,
    make_inputs,
    make_weights,
)
from trihybrid.train import Workers, process_group

Row = dict[str, Any]
Operator = Callable[..., tuple[Tensor, Tensor]]

REPETITIONS, NEAR = 7, 1e-5
GIB = 2**30


def main() -> int:
    """Start two processes, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="4096,131072", help="tokens that are timed, even")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="in small, on CPUs")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    parser.add_argument("--worker", action="store_true", help="be one of the two processes")
    given = parser.parse_args()
    if given.worker:
        return work(given)
    if not given.tiny and torch.cuda.device_count() < 2:
        parser.error("fewer than two GPUs here; --tiny runs it in small on CPUs")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if given.tiny else {}
    command = [*launch, __file__, *sys.argv[1:], "--worker"]
    return int(subprocess.run(command, env={**os.environ, **hidden}).returncode != 0)


def work(given: argparse.Namespace) -> int:
    """Measure as one of two processes; the first prints."""
    with process_group("cpu" if given.tiny else "cuda") as workers:
        dtype = torch.float32 if given.tiny else torch.bfloat16
        length, width = (40, 8) if given.tiny else (8192, 128)
        rows = [error_row(workers, kind, (1, length, 2, width), dtype) for kind in KINDS]
        lengths = [40] if given.tiny else [int(length) for length in given.lengths.split(",")]
        rows += [speed_row(workers, (1, length, given.heads, width), dtype) for length in lengths]
    if not workers.first:
        return 0
    print("| inputs | worst error, one GPU | two | apart |\n|---|---|---|---|")
    for row in rows[: len(KINDS)]:
        print(f"| {row['kind']} | {row['one']:.1e} | {row['two']:.1e} | {row['apart']:.1e} |")
    print("| tokens | one GPU ms | two ms | ratio | one GPU peak GiB | two |\n|---|---|---|---|---|---|")
    for row in rows[len(KINDS) :]:
        times = f"{row['one_ms']:.3f} | {row['two_ms']:.3f} | {row['one_ms'] / row['two_ms']:.2f}"
        print(f"| {row['length']:,} | {times} | {row['one_gib']:.2f} | {row['two_gib']:.2f} |")
    if given.json is not None:
        given.json.mkdir(parents=True, exist_ok=True)
        (given.json / "wkv7_two_gpus.json").write_text(json.dumps(rows, indent=2) + "\n")
    missed = [row["kind"] for row in rows[: len(KINDS)] if not row["two"] <= max(NEAR, 2 * row["one"])]
    if missed:
        print(f"missed: two GPUs are more than twice as far off on {', '.join(missed)}")
    return 1 if missed else 0


def error_row(workers: Workers, kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Row:
    """How far one GPU and two are from float64, and from each other."""
    inputs = make_inputs(kind, shape, 0, workers.device, dtype)
    weights = make_weights(shape, inputs[3])
    expected = answer(inputs, None, weights)
    leaves = [x.detach().requires_grad_() for x in inputs]
    one = differentiate(*wkv7(*leaves), leaves, weights)
    own = half(inputs, workers)
    do, dfinal = half([weights[0]], workers)[0], weights[1] * workers.first
    leaves = [x.detach().requires_grad_() for x in own]
    parts = differentiate(*wkv7_context(*leaves), leaves, (do, dfinal))
    two = [whole(x, name) for x, name in zip(parts, NAMES, strict=True)]
    return {
        "benchmark": "wkv7_two_gpus",
        "kind": kind,
        "one": max(errors(one, expected, inputs[0]).values()),
        "two": max(errors(two, expected, inputs[0]).values()),
        "apart": max(errors(two, one, inputs[0]).values()),
    }


def half(tensors: Sequence[Tensor], workers: Workers) -> list[Tensor]:
    """This process's half of the tokens; states, which have none, are whole."""
    own = [x.chunk(2, 1)[workers.rank].contiguous() for x in tensors[:6]]
    return own + list(tensors[6:])


def whole(part: Tensor | None, name: str) -> Tensor:
    """Both processes' parts of a result; states are whole on each."""
    assert part is not None
    if name in ("final", "state"):
        return part
    parts = [torch.empty_like(part) for _ in range(2)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, 1)


def speed_row(workers: Workers, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Row:
    """Milliseconds and peak memory of forward and backward of a sequence on one GPU, and half of it on each of two."""
    inputs = make_inputs("random", shape, 0, workers.device, dtype)
    do, _ = make_weights(shape, inputs[3])
    row: Row = {"benchmark": "wkv7_two_gpus", "length": shape[1], "heads": shape[2]}
    forms: dict[str, tuple[Operator, list[Tensor], Tensor]] = {
        "one": (wkv7, inputs, do),
        "two": (wkv7_context, half(inputs, workers), half([do], workers)[0]),
    }
    for form, (operator, given, weight) in forms.items():
        leaves = [x.detach().requires_grad_() for x in given]
        found = []
        if form == "two" or workers.first:
            for _ in range(REPETITIONS):
                wait(workers, form == "two")
                start = time.perf_counter()
                torch.autograd.grad(operator(*leaves)[0], leaves, weight)
                wait(workers, form == "two")
                found.append(1e3 * (time.perf_counter() - start))
            row[f"{form}_ms"] = statistics.median(found[2:])
            row[f"{form}_gib"] = peak(workers)
        wait(workers, True)
    return row


def wait(workers: Workers, all_of_them: bool) -> None:
    """Until this GPU is done, or both are."""
    if workers.device.type == "cuda":
        torch.cuda.synchronize()
    if all_of_them:
        workers.wait()


def peak(workers: Workers) -> float:
    """GiB at most since the last call, what lay there before included."""
    if workers.device.type != "cuda":
        return 0.0
    found = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return found


if __name__ == "__main__":
    sys.exit(main())
