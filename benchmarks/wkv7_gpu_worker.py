"""One process of wkv7_gpu.py: runs the tasks that come in as JSON, and prints a line of JSON for each row.

Separate, so that two versions of a peer do not meet, and so that one that corrupts its process ends nothing else.
"""

import functools
import importlib.metadata
import json
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from trihybrid.ops.rates import DECAY_FLOOR
from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.fla import in_fla_terms
from trihybrid.ops.wkv7.triton import wkv7_triton, wkv7_triton_grouped
from trihybrid.testing.wkv7_cases import (
    answer,
    differentiate,
    errors,
    make_inputs,
    make_weights,
)

Operator = Callable[..., tuple[Tensor, Tensor]]
LENGTHS = (1, 15, 17, 33, 64, 65, 300, 2048)  # of the error table
CACHE = 256 * 2**20  # bytes that push everything out of a GPU's cache
SECONDS, MOST, LEAST = 0.3, 50, 5  # of one measurement, and its repetitions
DECODE_HEADS, GROUPS = 32, 4
OURS = "triton"
DEVICE = "cuda"

FEW = 3
"""Configurations of a peer's kernel that are tried where only its errors are wanted: they compute the same."""

tuned: dict[str, int] = {}
"""Kernel name -> configurations that its tuner tried."""

tuning: dict[str, int | None] = {"most": None}
"""How many of a list `tune_in_parallel` leaves; None for all."""


def main() -> None:
    """Tasks from standard input; from the command line the worker's name, the peer's folder ("" for none), and what the
    names of the peer's modes must hold."""
    name, folder, holds = sys.argv[1:]
    if folder:
        sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    tune_in_parallel()
    modes = {mode: x for mode, x in operators(name).items() if name == "ours" or holds in mode}
    for task in json.load(sys.stdin):
        show({"started": task})
        tuning["most"] = FEW if task["task"] == "errors" else None
        for row in TASKS[task["task"]](name, modes, **{k: v for k, v in task.items() if k != "task"}):
            show(task | row | {"worker": name, "benchmark": "wkv7_gpu"})
    show({"tuned": tuned, "versions": {"torch": torch.__version__, "triton": triton.__version__}})


def show(row: dict[str, Any]) -> None:
    """One line on standard output, at once."""
    print(json.dumps(row), flush=True)


def tune_in_parallel() -> None:
    """Let a tuner compile its configurations (as many as `tuning` leaves) at once before it times them one by one, for
    25 ms each, and count them."""
    prune = Autotuner.prune_configs
    executor = ThreadPoolExecutor(os.cpu_count())

    def compile_all(self: Autotuner, arguments: dict[str, Any]) -> list[triton.Config]:
        configurations = prune(self, arguments)[: tuning["most"]]
        tuned[self.base_fn.__name__] = max(len(configurations), tuned.get(self.base_fn.__name__, 0))
        try:
            with AsyncCompileMode(executor, ignore_errors=True):
                for configuration in configurations:
                    options = arguments | configuration.all_kwargs() | {"warmup": True}
                    self.fn.run(*self.nargs.values(), **options)
        except Exception:
            # The tuner then compiles them itself, one after the other.
            logging.exception("%s was not compiled in parallel", self.base_fn.__name__)
        return configurations

    Autotuner.prune_configs = compile_all
    Autotuner.do_bench = property(lambda self: functools.partial(do_bench, warmup=5, rep=25))


def compile_in_parallel(call: Callable[[], Any]) -> None:
    """Compile the kernels that a call launches, all at once and without launching one: its results are not filled."""
    run = JITFunction.run

    def only_compile(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    executor = ThreadPoolExecutor(os.cpu_count())
    JITFunction.run = only_compile
    try:
        with torch.autograd.set_multithreading_enabled(False), AsyncCompileMode(executor, ignore_errors=True):
            call()
    finally:
        JITFunction.run = run


def operators(name: str) -> dict[str, Operator]:
    """What a worker compares, as (r, log_w, k, v, a, b, state, reset) -> (o, state)."""
    if name == "ours":
        return {OURS: wkv7_triton, "torch, chunked": functools.partial(wkv7, backend="chunked")}
    from fla.ops.rwkv7 import chunk_rwkv7

    version = importlib.metadata.version("fla-core")
    if name != f"fla-{version}":
        raise ValueError(f"the folder given for {name} holds fla-core {version}")
    options: dict[str, dict[str, Any]] = {"default": {}}
    if version != "0.4.1":
        safe = {f"safe_gate C={c}": {"safe_gate": True, "chunk_size": c} for c in (16, 32)}
        options |= safe | {"lower_bound C=64": {"lower_bound": DECAY_FLOOR}}
        options |= {f"{mode}, no recompute": o | {"disable_recompute": True} for mode, o in options.items()}
    return {mode: functools.partial(peer, chunk_rwkv7, o) for mode, o in options.items()}


def peer(
    function: Callable[..., tuple[Tensor, Tensor]], options: dict[str, Any], *arguments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """fla's operator in our terms, in a mode of it."""
    *tokens, state, reset = arguments
    return in_fla_terms(functools.partial(function, **options), tokens, state, reset)


def median_ms(call: Callable[[], Any]) -> float:
    """Median of the milliseconds on the GPU, from a cold cache. The GPU sleeps first, so that it never waits for the
    host."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    repetitions = max(LEAST, min(MOST, int(SECONDS / whole)))
    group = max(1, min(repetitions, int(0.1 / host)))
    cache = torch.empty(CACHE, dtype=torch.int8, device=DEVICE)
    found: list[float] = []
    while len(found) < repetitions:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(group)]
        torch.cuda._sleep(int(2e9 * (1.3 * host * group + 1e-3)))
        for before, after in events:
            cache.zero_()
            before.record()
            call()
            after.record()
        torch.cuda.synchronize()
        found += [before.elapsed_time(after) for before, after in events]
    return statistics.median(found)


def wall_ms(call: Callable[[], Any]) -> float:
    """Milliseconds a call of many, one after the other, by the clock: the GPU's or the host's, whichever is slower."""
    found: list[float] = []
    repetitions = 1
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repetitions):
            call()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / repetitions
        found.append(1e3 * seconds)
        repetitions = max(1, min(20, int(SECONDS / 5 / seconds)))
    return statistics.median(found[1:])


def measure_speed(name: str, modes: dict[str, Operator], shape: Sequence[int], only: str | None = None):
    """Forward and forward+backward of every mode, with peak memory, and the error of the last head's outputs."""
    batch, length, heads, width = shape
    *tokens, _ = make_inputs("random", (batch, length, heads, width), 0, DEVICE, torch.bfloat16)
    do, _ = make_weights((batch, length, heads, width), tokens[3])
    last = [x[-1:, :, -1:].double() for x in tokens]
    with torch.no_grad():
        exact, _ = wkv7(*last, backend="chunked")
    for mode, operator in modes.items():
        if only is not None and mode != only:
            continue

        def forward(operator: Operator = operator) -> Tensor:
            with torch.no_grad():
                return operator(*tokens, None, None)[0]

        leaves = [x.detach().requires_grad_() for x in tokens]

        def both(operator: Operator = operator, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(operator(*leaves, None, None)[0], leaves, do)

        row: dict[str, Any] = {"mode": mode}
        try:
            if mode == OURS:
                compile_in_parallel(both)
                compile_in_parallel(forward)
            o = forward()
            row["error"] = ((o[-1:, :, -1:].double() - exact).norm() / exact.norm()).item()
            del o
            row["forward_ms"] = median_ms(forward)
            both()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            row["both_ms"] = median_ms(both)
            row["wall_ms"] = wall_ms(both)
        except Exception as error:
            row["failed"] = reason(error)
        yield row


def reason(error: Exception) -> str:
    """What a row says of a mode that failed, when the GPU still answers; if not, the process ends here."""
    torch.cuda.synchronize()
    return " ".join(f"{type(error).__name__}: {error}".split())[:120].replace("|", "/")


def measure_grouped(name: str, modes: dict[str, Operator], shape: Sequence[int]):
    """32 heads that share the keys and values of 4, in the dtypes of the rwkv7 mixer, against the same repeated."""
    r, log_w, k, v, a, _, _ = make_inputs("random", tuple(shape), 0, DEVICE, torch.bfloat16)
    heads = shape[2]
    generator = torch.Generator(DEVICE).manual_seed(1)
    k, v, kk = (x[:, :, :GROUPS].contiguous() for x in (k, v, -a))
    iclr = torch.rand(tuple(shape), generator=generator, device=DEVICE)
    given = [r, log_w.float(), k, v, kk.float(), iclr]
    leaves = [x.detach().requires_grad_() for x in given]
    do, _ = make_weights(tuple(shape), r)

    def repeated(
        r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kk: Tensor, iclr: Tensor
    ) -> tuple[Tensor, Tensor]:
        k, v, kk = (x.repeat_interleave(heads // GROUPS, 2) for x in (k.float(), v, kk))
        return wkv7_triton(r, log_w, k * (1 - log_w.exp() + iclr), v, -kk, kk * iclr)

    for mode, operator in {"shared": wkv7_triton_grouped, "repeated": repeated}.items():

        def forward(operator: Operator = operator) -> Tensor:
            with torch.no_grad():
                return operator(*given)[0]

        def both(operator: Operator = operator) -> None:
            torch.autograd.grad(operator(*leaves)[0], leaves, do)

        compile_in_parallel(both)
        compile_in_parallel(forward)
        both()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        peak = torch.cuda.max_memory_allocated() - before
        yield {"mode": mode, "forward_ms": median_ms(forward), "both_ms": median_ms(both), "peak_bytes": peak}


def measure_copy(name: str, modes: dict[str, Operator], shape: Sequence[int]):
    """A copy of the bytes that the operator has to move in bfloat16: 14 D a token and head forwards, 40 D in both."""
    yield {
        "mode": "copy",
        **{
            f"{part}_ms": copy_ms(widths * math.prod(shape))
            for part, widths in (("forward", 14), ("both", 40))
        },
    }


def copy_ms(moved: int) -> float:
    """Milliseconds of a copy that reads and writes so many bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def measure_errors(
    name: str,
    modes: dict[str, Operator],
    kind: str,
    lengths: Sequence[int],
    widths: Sequence[int],
    only: str | None = None,
):
    """Each mode's worst error over lengths, widths, with and without a state, and packed documents, by name; a NaN is
    the worst of all."""
    modes = {mode: operator for mode, operator in modes.items() if only is None or mode == only}
    worst: dict[str, dict[str, float]] = {mode: {} for mode in modes}
    at: dict[str, tuple[float, str]] = dict.fromkeys(modes, (-1.0, ""))
    failed: dict[str, str] = {}
    for length in lengths:
        for width in widths:
            shape = (1, length, 2, width)
            inputs = make_inputs(kind, shape, length, DEVICE, torch.bfloat16)
            weights = make_weights(shape, inputs[3])
            for case in ("state", "no state", "documents"):
                given, reset = inputs if case == "state" else [*inputs[:6], None], None
                if case == "documents":
                    reset = torch.rand(1, length, device=DEVICE) < 0.03
                    reset[0, 0] = True
                expected = answer(given, reset, weights)
                where = f"T={length} D={width} {case}"
                for mode, operator in modes.items():
                    if mode in failed:
                        continue
                    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
                    try:
                        found = differentiate(*operator(*leaves, reset), leaves, weights)
                    except Exception as error:
                        failed[mode] = f"{where}: {reason(error)}"
                        continue
                    for part, error in errors(found, expected, given[0]).items():
                        error = error if math.isfinite(error) else math.inf
                        worst[mode][part] = max(error, worst[mode].get(part, 0.0))
                        at[mode] = max(at[mode], (error, f"{part}: {where}"))
    for mode, found in worst.items():
        if mode in failed:
            yield {"mode": mode, "failed": failed[mode]}
        else:
            yield {"mode": mode, "errors": found, "where": at[mode][1]}


def measure_decode(name: str, modes: dict[str, Operator], batch: int, width: int):
    """One token of a batch with 32 heads, replayed as a graph over more states than the cache holds."""
    *tokens, _ = make_inputs("random", (batch, 1, DECODE_HEADS, width), 0, DEVICE, torch.bfloat16)
    shape = (batch, DECODE_HEADS, width, width)
    count = max(2, CACHE // (4 * math.prod(shape)))
    states = [torch.zeros(shape, device=DEVICE) for _ in range(count)]
    r, log_w, k, v, a, b = tokens
    calls: dict[str, Callable[[Tensor], Any]] = {}
    if name == "ours":
        from trihybrid.ops.wkv7.decode import wkv7_step, wkv7_step_

        calls["in place"] = lambda state: wkv7_step_(*tokens, state)
        calls["fresh state"] = lambda state: wkv7_step(*tokens, state)
        calls["state read and written, no more"] = lambda state: state.mul_(1.0)
    else:
        from fla.ops.rwkv7 import fused_mul_recurrent_rwkv7, fused_recurrent_rwkv7

        calls["fused_recurrent"] = lambda state: fused_recurrent_rwkv7(
            r, log_w, k, v, a, b, scale=1.0, initial_state=state, output_final_state=True
        )
        calls["fused_mul_recurrent"] = lambda state: fused_mul_recurrent_rwkv7(
            r, log_w, k, v, -a, torch.ones_like(a), scale=1.0, initial_state=state, output_final_state=True
        )
    moved = sum(x.numel() * x.element_size() for x in [*tokens, v]) + 8 * math.prod(shape)
    floor_us = 1e3 * copy_ms(2**32) * moved / 2**32
    for mode, call in calls.items():
        with torch.no_grad():
            call(states[0])
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = [call(state) for state in states]
        microseconds = 1e3 * median_ms(graph.replay) / count
        yield {"mode": mode, "microseconds": microseconds, "bytes": moved, "floor_us": floor_us}
        del graph, kept


TASKS = {
    "speed": measure_speed,
    "copy": measure_copy,
    "grouped": measure_grouped,
    "errors": measure_errors,
    "decode": measure_decode,
}


if __name__ == "__main__":
    main()
