"""Candidate forms of the WKV-7 kernels, each checked and timed: one call on a GPU, under 150 s.

    python benchmarks/wkv7_candidates.py [--only walk,gradient]

Candidates are compiled side by side in processes first. Times are medians from a cold cache, at B=1 T=4096 H=32 D=128.
"""

import argparse
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

WALKS = [  # chunk, BLOCK_V, VALUES_A_WARP, STAGES, SPLIT
    (16, 32, 16, 3, 1),
    (16, 32, 8, 3, 1),
    (16, 32, 4, 3, 1),
    (16, 16, 16, 3, 1),
    (16, 64, 16, 3, 1),
    (16, 32, 16, 3, 8),
    (32, 32, 16, 3, 1),
    (32, 32, 8, 3, 1),
    (32, 64, 16, 3, 1),
    (64, 32, 8, 2, 1),
    (64, 32, 4, 2, 1),
    (64, 64, 16, 2, 1),
    (64, 128, 16, 2, 1),
]
PREPARES = [(16, 32, 1), (16, 64, 2), (16, 128, 4), (32, 32, 1), (32, 64, 4)]  # chunk, BLOCK_K, WARPS
GRADIENTS = [(64, 4, 1), (64, 4, 2), (64, 8, 1), (32, 2, 1), (32, 4, 1), (128, 8, 1)]  # BLOCK_K, WARPS, STAGES


def candidates() -> list[tuple[str, tuple[int, ...]]]:
    found = [("walk", x) for x in WALKS] + [("prepare", x) for x in PREPARES]
    return found + [("gradient", x) for x in GRADIENTS] + [("whole", ())]


def inputs(shape):
    from trihybrid.testing.wkv7_cases import make_inputs, make_weights

    *tokens, _ = make_inputs("random", shape, 0, DEVICE, torch.bfloat16)
    return tokens, make_weights(shape, tokens[3])[0]


def prepared(shape, chunk):
    """Random operands of `walk`, of a size that keeps states finite."""
    from trihybrid.ops.wkv7.triton.prepare import Prepared

    batch, length, heads, width = shape
    count = batch * heads * -(-length // chunk)

    def half(*sizes):
        return (0.03 * torch.randn(*sizes, device=DEVICE)).half()

    wide = [half(count, chunk, width) for _ in range(4)]
    gate = torch.full((count, width), 0.9, device=DEVICE)
    return Prepared(*wide, half(count, chunk, chunk), gate, *(half(count, chunk, chunk) for _ in range(3)))


def calls(kind, settings, shape):
    """(what, function) pairs of a candidate."""
    import trihybrid.ops.wkv7.triton.gradient as gradient
    import trihybrid.ops.wkv7.triton.prepare as prepare
    import trihybrid.ops.wkv7.triton.state as state

    (r, w, k, v, a, b), do = inputs(shape)
    if kind == "walk":
        chunk, state.BLOCK_V, state.VALUES_A_WARP, state.STAGES, state.SPLIT = settings
        ready = prepared(shape, chunk)
        largest = state.largest_gradient(do, None)
        yield "forward", lambda: state.walk(ready, v, None, False)
        yield "forward, kept", lambda: state.walk(ready, v, None, True)
        yield "backward", lambda: state.walk_back(ready, do, None, largest, v.dtype)
        yield "largest", lambda: state.largest_gradient(do, None)
    elif kind == "prepare":
        chunk, prepare.BLOCK_K, prepare.WARPS = settings
        yield "forward", lambda: prepare.prepare(r, w, k, a, b, None, chunk, False)
        yield "kept", lambda: prepare.prepare(r, w, k, a, b, None, chunk, True)
    elif kind == "gradient":
        gradient.BLOCK_K, gradient.WARPS, gradient.STAGES = settings
        ready = prepare.prepare(r, w, k, a, b, None, 16, True)
        _, _, kept, u = state.walk(ready, v, None, True)
        largest = state.largest_gradient(do, None)
        _, _, dkept, z = state.walk_back(ready, do, None, largest, v.dtype)
        yield (
            "gradient",
            lambda: gradient.differentiate((r, w, k, a, b), v, do, None, u, z, kept, dkept, largest),
        )
    else:
        from trihybrid.ops.wkv7.triton import wkv7_triton

        leaves = [x.detach().requires_grad_() for x in (r, w, k, v, a, b)]

        def forward():
            with torch.no_grad():
                return wkv7_triton(*leaves)

        yield "forward", forward
        yield "both", lambda: torch.autograd.grad(wkv7_triton(*leaves)[0], leaves, do)


def defaults():
    """Back to what the modules say."""
    import importlib

    for name in ("prepare", "state", "gradient"):
        if f"{ROOM}.{name}" in sys.modules:
            module = sys.modules[f"{ROOM}.{name}"]
            for key, value in KNOBS.get(name, {}).items():
                setattr(module, key, value)
        else:
            module = importlib.import_module(f"{ROOM}.{name}")
            KNOBS[name] = {k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, int)}


KNOBS: dict[str, dict[str, int]] = {}


def compile_one(candidate):
    """Run a candidate once, which leaves its kernels in the cache on disk."""
    try:
        defaults()
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
        shape = (2, 333, 2, 128)
        given = make_inputs(kind, shape, 0, DEVICE, torch.bfloat16)
        show(kind, shape, given, torch.rand(2, 333, device=DEVICE) < 0.02 if kind == "slow_decay" else None)
    shape = (1, 4096, 4, 128)
    show("random", shape, make_inputs("random", shape, 1, DEVICE, torch.bfloat16), None)


def first_lines(text):
    lines = [x for x in text.splitlines() if x.strip()]
    return " / ".join(x.strip()[:160] for x in (lines[-6:] if len(lines) > 6 else lines))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="walk,prepare,gradient,whole,check")
    only = parser.parse_args().only.split(",")
    start = time.perf_counter()
    todo = [c for c in candidates() if c[0] in only]
    bad = {}
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {c: pool.submit(compile_one, c) for c in todo}
        for candidate, future in waiting.items():
            try:
                bad[candidate] = future.result(timeout=max(1, 75 - (time.perf_counter() - start)))
            except TimeoutError:
                bad[candidate] = "still compiling after 75 s"
            except Exception as error:
                bad[candidate] = f"{type(error).__name__}: {error}"
        if any("still" in (x or "") for x in bad.values()):
            for process in pool._processes.values():
                process.kill()
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    if "check" in only:
        try:
            check()
        except Exception:
            print("check:", first_lines(traceback.format_exc()), flush=True)
    from triton.testing import do_bench

    for candidate in todo:
        kind, settings = candidate
        if bad[candidate]:
            print(f"{kind} {settings}: {first_lines(bad[candidate])}", flush=True)
            continue
        try:
            defaults()
            times = []
            for what, call in calls(kind, settings, SHAPE):
                times.append(
                    f"{what} {do_bench(call, warmup=10, rep=60, return_mode='median'):.3f}"
                )
            print(f"{kind} {settings}: " + ", ".join(times) + " ms", flush=True)
        except Exception:
            print(f"{kind} {settings}: {first_lines(traceback.format_exc())}", flush=True)
    if "whole" in only:
        defaults()
        for shape in ((8, 4096, 32, 128), (1, 32_768, 32, 128)):
            try:
                times = [
                    f"{what} {do_bench(call, warmup=20, rep=100, return_mode='median'):.3f}"
                    for what, call in calls("whole", (), shape)
                ]
                print(f"whole {shape}: " + ", ".join(times) + " ms", flush=True)
            except Exception:
                print(f"whole {shape}: {first_lines(traceback.format_exc())}", flush=True)
        try:
            profile()
        except Exception:
            print("profile:", first_lines(traceback.format_exc()), flush=True)
    print(f"finished after {time.perf_counter() - start:.0f} s")


def profile():
    """GPU time of each kernel of one forward and backward."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    call = dict(calls("whole", (), SHAPE))["both"]
    call()
    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    for row in found.key_averages():
        if row.device_time_total > 50:
            print(f"  {row.key[:60]:60} {row.count:4d} x {row.device_time_total / row.count:.1f} us")


if __name__ == "__main__":
    main()
