"""Candidate forms of the WKV-7 kernels, each checked and timed: one call on a GPU, under 65 s.

    python benchmarks/wkv7_candidates.py

Candidates are compiled side by side in processes first. Times are medians from a cold cache, at B=1 T=4096 H=32 D=128.
The best of each kernel makes the whole, beside the old form (wkv7_old).
"""

import importlib
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

import torch

DEVICE = "cuda"
SHAPE = (1, 4096, 32, 128)
ROOM = "trihybrid.ops.wkv7.triton"

# The module constants of each kernel, and what to try.
KNOBS = {
    "prepare": ("BLOCK_K", "WARPS", "STAGES", "REGISTERS"),
    "state": ("BLOCK_V", "STAGES"),
    "sums": ("BLOCK_K", "STAGES"),
    "gradient": ("BLOCK_K", "WARPS", "STAGES", "REGISTERS"),
}
TRIED = {
    "prepare": [
        (32, 1, 2, None),
        (32, 1, 2, 168),
        (32, 1, 1, None),
        (16, 1, 2, None),
        (16, 1, 2, 128),
    ],
    "state": [(32, 3), (32, 4), (32, 6)],
    "sums": [(64, 3), (64, 2), (128, 3), (32, 3)],
    "gradient": [
        (32, 1, 1, None),
        (32, 1, 1, 168),
        (32, 1, 1, 128),
        (16, 1, 1, None),
        (16, 1, 1, 128),
        (64, 2, 1, 168),
        (128, 4, 1, 168),
        (32, 1, 2, 168),
    ],
}
WHOLE = ("old", "kept", "prepared again")


def candidates():
    """(kind, settings) of everything."""
    return [(kind, x) for kind, tried in TRIED.items() for x in tried] + [("whole", x) for x in WHOLE]


def choose(kind, settings):
    """Set the constants of a kernel."""
    module = importlib.import_module(f"{ROOM}.{kind}")
    for name, value in zip(KNOBS[kind], settings, strict=True):
        setattr(module, name, value)


def inputs(shape):
    from trihybrid.testing.wkv7_cases import make_inputs, make_weights

    *tokens, _ = make_inputs("random", shape, 0, DEVICE, torch.bfloat16)
    return tokens, make_weights(shape, tokens[3])[0]


def calls(kind, settings, shape):
    """(what, function) pairs of a candidate."""
    import trihybrid.ops.wkv7.triton as room
    from trihybrid.ops.wkv7.triton import gradient, prepare, state, sums

    (r, w, k, v, a, b), do = inputs(shape)
    if kind == "whole":
        operator = room.wkv7_triton
        if settings == "old":
            from wkv7_old import wkv7_triton as operator
        else:
            room.KEEP_PREPARED = settings == "kept"
        leaves = [x.detach().requires_grad_() for x in (r, w, k, v, a, b)]

        def forward():
            with torch.no_grad():
                return operator(*leaves)

        yield "forward", forward
        yield "both", lambda: torch.autograd.grad(operator(*leaves)[0], leaves, do)
        return
    choose(kind, settings)
    if kind == "prepare":
        yield "forward", lambda: prepare.prepare(r, w, k, a, b, None, 16, False)
        yield "kept", lambda: prepare.prepare(r, w, k, a, b, None, 16, True)
        return
    # Random operands, of a size that keeps states finite: only the time matters here, and only this kernel is compiled.
    batch, length, heads, width = shape
    lanes, chunks, groups = batch * heads, length // 16, length // 64
    count = lanes * chunks

    def half(*sizes):
        return (0.03 * torch.randn(*sizes, device=DEVICE)).half()

    gate = torch.full((count, width), 0.9, device=DEVICE)
    ready = prepare.Prepared(half(4, count, 16, width), half(4, count, 16, 16), gate)
    largest = torch.ones(batch, heads, device=DEVICE)
    u, z, true_u, true_z = (half(count, 16, width) for _ in range(4))
    kept, dkept = (half(lanes, groups + 1, width, width) for _ in range(2))
    if kind == "state":
        yield "forward", lambda: state.walk(ready, v, None, False)
        yield "kept", lambda: state.walk(ready, v, None, True)
        yield "backward", lambda: state.walk_back(ready, do, None, largest, v.dtype)
    elif kind == "sums":
        yield (
            "sums",
            lambda: sums.sum_values(ready, v, do, u, z, true_u, true_z, kept, dkept, largest),
        )
    else:
        scores, e = half(4, count, 16, 16), torch.randn(lanes, groups, width, device=DEVICE)
        found = (u, z, true_u, true_z)
        yield "gradient", lambda: gradient.differentiate((r, w, k, a, b), None, scores, found, e, largest)


def compile_one(candidate):
    """Run a candidate once, which leaves its kernels in the cache on disk."""
    try:
        for _, call in calls(*candidate, SHAPE):
            call()
        torch.cuda.synchronize()
        return None
    except Exception:
        return traceback.format_exc()


def check():
    """Relative errors of outputs and gradients against the float64 chunked form, by kind of input."""
    from trihybrid.ops.wkv7.triton import wkv7_triton
    from trihybrid.testing.wkv7_cases import KINDS, answer, differentiate, errors, make_inputs, make_weights

    def show(kind, shape, given, reset):
        weights = make_weights(shape, given[3])
        expected = answer(given, reset, weights)
        leaves = [None if x is None else x.detach().requires_grad_() for x in given]
        found = errors(differentiate(*wkv7_triton(*leaves, reset), leaves, weights), expected, given[0])
        print(f"{kind:14} {shape} " + " ".join(f"{n} {e:.1e}" for n, e in found.items()), flush=True)

    for kind in KINDS:
        shape = (2, 150, 2, 128)
        given = make_inputs(kind, shape, 0, DEVICE, torch.bfloat16)
        show(kind, shape, given, torch.rand(2, 150, device=DEVICE) < 0.02 if kind == "slow_decay" else None)
    shape = (1, 2304, 4, 128)
    show("random", shape, make_inputs("random", shape, 1, DEVICE, torch.bfloat16), None)


def first_lines(text):
    lines = [x for x in text.splitlines() if x.strip()]
    return " / ".join(x.strip()[:160] for x in (lines[-6:] if len(lines) > 6 else lines))


def timed(candidate, shape=SHAPE):
    """Print the times of a candidate, and return their sum in ms; infinity when it fails."""
    from triton.testing import do_bench

    try:
        times = {
            what: do_bench(call, warmup=10, rep=60, return_mode="median")
            for what, call in calls(*candidate, shape)
        }
        listed = ", ".join(f"{what} {ms:.3f}" for what, ms in times.items())
        print(f"{candidate[0]} {candidate[1]} {'' if shape == SHAPE else shape}: {listed} ms", flush=True)
        return sum(times.values())
    except Exception:
        print(f"{candidate[0]} {candidate[1]}: {first_lines(traceback.format_exc())}", flush=True)
        return float("inf")


def main():
    """Compile, time each kernel, choose the best of each, and time and check the whole with these."""
    start = time.perf_counter()
    todo = candidates()
    bad = {}
    with ProcessPoolExecutor(16, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {c: pool.submit(compile_one, c) for c in todo}
        for candidate, future in waiting.items():
            try:
                bad[candidate] = future.result(timeout=max(0.1, 36 - (time.perf_counter() - start)))
            except TimeoutError:
                bad[candidate] = "still compiling"
            except Exception as error:
                bad[candidate] = f"{type(error).__name__}: {error}"
        if "still compiling" in bad.values():
            for process in list(pool._processes.values()):
                process.kill()
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    for candidate, why in bad.items():
        if why:
            print(f"{candidate[0]} {candidate[1]}: {first_lines(why)}", flush=True)
    for kind, tried in TRIED.items():
        times = {x: timed((kind, x)) for x in tried if not bad[kind, x]}
        if times:
            best = min(times, key=times.get)
            choose(kind, best)
            print(f"chosen for {kind}: {dict(zip(KNOBS[kind], best, strict=True))}", flush=True)
    for shape in (SHAPE, (8, 4096, 32, 128), (1, 32_768, 32, 128)):
        for which in WHOLE:
            timed(("whole", which), shape)
    try:
        check()
    except Exception:
        print("check:", first_lines(traceback.format_exc()), flush=True)
    try:
        profile()
    except Exception:
        print("profile:", first_lines(traceback.format_exc()), flush=True)
    print(f"finished after {time.perf_counter() - start:.0f} s")


def profile():
    """GPU time of each kernel of one forward and backward, and its peak memory."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    for which in ("kept", "prepared again", "old"):
        call = dict(calls("whole", which, SHAPE))["both"]
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        print(f"peak memory, {which}: {peak / 2**30:.3f} GiB", flush=True)
    call = dict(calls("whole", "kept", SHAPE))["both"]
    call()
    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    for row in found.key_averages():
        if row.key.startswith("_") and row.device_time_total > 50:
            print(f"  {row.key[:60]:60} {row.count:4d} x {row.device_time_total / row.count:.1f} us")


if __name__ == "__main__":
    main()
