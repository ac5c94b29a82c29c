"""Variants of the kernels of WKV-7, each alone and together, beside the form before."""

import statistics
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
START = time.perf_counter()

import torch
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction
from wkv7_cand_prepare import prepare as once
from wkv7_cand_sums import together
from wkv7_gpu_worker import median_ms
from wkv7_old import gradient as old_gradient
from wkv7_old import prepare as old_prepare
from wkv7_old import state as old_state
from wkv7_old import sums as old_sums

from trihybrid.ops.wkv7.triton import gradient, prepare, state, sums, wkv7_triton
from trihybrid.testing.wkv7_cases import make_inputs, make_weights


def say(*what):
    print(f"[{time.perf_counter() - START:5.1f}]", *what, flush=True)


def attempt(name, call):
    if time.perf_counter() - START > 55:
        return None
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        say(name, "FAILED", type(error).__name__, str(error).splitlines()[0][:300])
        if "--trace" in sys.argv:
            traceback.print_exc()


class Case:
    def __init__(self, batch, time, heads=32, width=128):
        *tokens, _ = make_inputs("random", (batch, time, heads, width), 0, "cuda", torch.bfloat16)
        self.tokens, self.do = tokens, make_weights((batch, time, heads, width), tokens[3])[0]
        r, w, k, v, a, b = tokens
        self.five = (r, w, k, a, b)
        self.ready = prepare.prepare(*self.five, None, 16, True, False)
        self.largest = state.largest_gradient(self.do, None)
        o, last, self.kept, self.u, self.true_u = state.walk(self.ready, v, heads, None, True)
        _, _, self.dkept, self.z, self.true_z = state.walk_back(
            self.ready, self.do, None, self.largest, v.dtype
        )
        n, width, chunk = self.u.shape
        self.ut, self.true_ut, self.zt, self.true_zt = (
            x.transpose(1, 2).contiguous() for x in (self.u, self.true_u, self.z, self.true_z)
        )
        self.sums = sums.sum_values(
            self.ready,
            v,
            self.do,
            self.u,
            self.z,
            self.true_u,
            self.true_z,
            self.kept,
            self.dkept,
            self.largest,
        )

    def prepare(self, room, keep=True):
        more = () if room is old_prepare else (False,)
        return room.prepare(*self.five, None, 16, keep, *more)

    def walk(self, room, keep=True):
        more = () if room is old_state else (self.tokens[0].shape[2],)
        return room.walk(self.ready, self.tokens[3], *more, None, keep)

    def walk_back(self, room):
        return room.walk_back(self.ready, self.do, None, self.largest, torch.bfloat16)

    def total(self, room):
        if room is old_sums:
            values = self.ut, self.zt, self.true_ut, self.true_zt
        else:
            values = self.u, self.z, self.true_u, self.true_z
        return room.sum_values(
            self.ready, self.tokens[3], self.do, *values, self.kept, self.dkept, self.largest
        )

    def gradient(self, room):
        more = () if room is old_gradient else (None,)
        return room.differentiate(
            self.five, None, self.sums[1], self.sums[0], self.sums[2], self.largest, *more
        )


def with_constants(room, call, **constants):
    def run():
        before = {name: getattr(room, name) for name in constants}
        for name, value in constants.items():
            setattr(room, name, value)
        try:
            return call()
        finally:
            for name, value in before.items():
                setattr(room, name, value)

    return run


def candidates(case):
    many = case.tokens[0].shape[0] > 1
    for part, stages, block in (
        ((128, 3, 64), (64, 3, 64), (64, 4, 64))
        if many
        else ((128, 4, 32), (64, 4, 32), (32, 4, 32), (64, 3, 32))
    ):
        constants = {"PART": part, "STAGES": stages, "NARROW": block, "WIDE": block}
        name = f"{part} {stages} {block}"
        yield f"walk alone {name}", with_constants(state, lambda: case.walk(state, False), **constants)
        yield f"walk kept {name}", with_constants(state, lambda: case.walk(state), **constants)
        yield f"walk back {name}", with_constants(state, lambda: case.walk_back(state), **constants)
    yield "prepare", lambda: case.prepare(prepare)
    for warps, block in ((2, 64), (2, 32), (4, 32)):
        yield (
            f"prepare once {warps} {block}",
            lambda warps=warps, block=block: once(*case.five, None, 16, True, False, warps, block),
        )
    values = case.u, case.z, case.true_u, case.true_z
    yield "sums", lambda: case.total(sums)
    yield (
        "sums together",
        lambda: together(case.ready, case.tokens[3], case.do, *values, case.kept, case.dkept, case.largest),
    )
    for block, warps in ((32, 1), (16, 1), (64, 2)):
        constants = {"BLOCK_K": block, "WARPS": warps}
        yield (
            f"gradient {block} {warps}",
            with_constants(gradient, lambda: case.gradient(gradient), **constants),
        )


def flat(x):
    if isinstance(x, torch.Tensor):
        return list(x) if x.dim() == 4 and x.shape[0] == 4 else [x]
    if isinstance(x, prepare.Prepared | old_prepare.Prepared):
        return [*x.wide_4NCK, *x.square_4NCC, x.g_NK]
    return [z for y in x for z in flat(y)]


def compare(results):
    for kind, found in results.items():
        reference = found[0][1]
        for name, values in found[1:]:
            worst = 0.0
            for x, y in zip(values, reference, strict=True):
                y = y.transpose(1, 2) if x.shape != y.shape else y
                x, y = x.double(), y.double()
                if (
                    x.dim() == 3
                    and x.shape[-1] == 16
                    and x.shape[-2] == 16
                    or x.dim() == 4
                    and x.shape[-1] == 16
                ):
                    x, y = x.tril(), y.tril()
                if x.numel():
                    worst = max(worst, ((x - y).norm() / y.norm().clamp_min(1e-9)).item())
            if worst > 1e-3:
                say(name, f"differs from {found[0][0]} by {worst:.1e}")


def compile_all():
    """Every kernel in parallel, without a launch: all calls are made with nothing in the tensors."""
    run = JITFunction.run

    def warm(self, *arguments, grid, warmup, **options):
        return run(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = warm
    try:
        with AsyncCompileMode(ThreadPoolExecutor(16), ignore_errors=True):
            for batch in (1, 8):
                case = Case(batch, 4096)
                for name, call in candidates(case):
                    attempt(name, call)
    finally:
        JITFunction.run = run


def grouped():
    """Correctness of the grouped form, and its time beside the operands as the mixer made them."""
    from trihybrid.ops.wkv7.grouped import wkv7_grouped
    from trihybrid.ops.wkv7.triton import wkv7_triton_grouped

    generator = torch.Generator("cuda").manual_seed(0)
    for shape, groups, timed in (((2, 333, 4, 128), 2, False), ((1, 4096, 32, 128), 4, True)):
        r, log_w, k, v, a, _, _ = make_inputs("random", shape, 0, "cuda", torch.bfloat16)
        iclr = torch.rand(shape, generator=generator, device="cuda")
        inputs = [r, log_w.float(), *(x[:, :, :groups] for x in (k, v)), -a[:, :, :groups].float(), iclr]
        do = make_weights(shape, r)[0]
        leaves = [x.detach().requires_grad_() for x in inputs]
        if not timed:
            exact = [x.detach().double().requires_grad_() for x in inputs]
            found, expected = (
                torch.autograd.grad(o, x, do.to(o.dtype))
                for o, x in (
                    (wkv7_triton_grouped(*leaves)[0], leaves),
                    (wkv7_grouped(*exact, backend="chunked")[0], exact),
                )
            )
            for name, x, y in zip("r log_w k v kk iclr".split(), found, expected, strict=True):
                say(f"grouped d{name} {((x.double() - y).norm() / y.norm()).item():.1e}")
            continue

        def repeated(r, log_w, k, v, kk, iclr):
            k, v, kk = (x.repeat_interleave(r.shape[2] // groups, 2) for x in (k.float(), v, kk))
            return wkv7_triton(r, log_w, k * (1 - log_w.exp() + iclr), v, -kk, kk * iclr)

        for name, operator in (("grouped", wkv7_triton_grouped), ("repeated", repeated)):

            def forward():
                with torch.no_grad():
                    return operator(*inputs)

            def both():
                torch.autograd.grad(operator(*leaves)[0], leaves, do)

            say(f"{name}: forward {median_ms(forward):.3f}, both {median_ms(both):.3f} ms")


def main():
    attempt("compile", compile_all)
    say("compiled in parallel")
    torch.cuda.synchronize()
    case = Case(1, 4096)
    results = {}
    for name, call in candidates(case):
        found = attempt(name, call)
        if found is not None:
            kind = name.split()[0] + name.split()[1] if name.startswith("walk") else name.split()[0]
            results.setdefault(kind, []).append((name, flat(found)))
    say("compiled")
    attempt("compare", lambda: compare(results))
    results.clear()

    def table(case, batch):
        for name, call in candidates(case):
            ms = attempt(name, lambda call=call: median_ms(call))
            if ms is not None:
                say(f"B={batch} {name}: {ms:.3f} ms")

    table(case, 1)
    case = None
    torch.cuda.empty_cache()
    *tokens, _ = make_inputs("random", (1, 4096, 32, 128), 0, "cuda", torch.bfloat16)
    do = make_weights((1, 4096, 32, 128), tokens[3])[0]
    leaves = [x.detach().requires_grad_() for x in tokens]

    def forward():
        with torch.no_grad():
            return wkv7_triton(*tokens)[0]

    def whole():
        return torch.autograd.grad(wkv7_triton(*leaves)[0], leaves, do)

    def dispatched():
        from trihybrid.ops.wkv7 import triton as room

        return torch.autograd.grad(room._forward(*leaves, None, None, 16, True, False)[0], leaves, do)

    for name, call in (("forward", forward), ("both dispatched", dispatched), ("both", whole)):
        ms = median_ms(call)
        # The host alone: the GPU sleeps while it is timed.
        hosts, walls = [], []
        for _ in range(20):
            torch.cuda.synchronize()
            torch.cuda._sleep(int(2e7))
            begin = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            walls.append((time.perf_counter() - begin) / 10)
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            kept = call()
        replay = median_ms(graph.replay)
        say(
            f"{name}: GPU {ms:.3f} ms, host alone {1e3 * statistics.median(hosts):.3f}, "
            f"back to back {1e3 * statistics.median(walls):.3f}, graph {replay:.3f}"
        )
        del kept
    torch.cuda.empty_cache()
    table(Case(8, 4096), 8)


if __name__ == "__main__":
    main()
