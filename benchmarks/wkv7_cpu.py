"""WKV-7 on a CPU: the chunked backend beside the reference (the recurrence under autograd), in one run.

    python benchmarks/wkv7_cpu.py [--threads 1] [--repetitions N] [--json FOLDER]

Prints one table: medians over interleaved repetitions, their ratio, and the relative rms error of chunked against
reference, both in float32, over the outputs (forward) and the worst gradient (forward+backward). With one thread the
times are CPU time of the process, which other work on the machine disturbs least; with more they are wall time.
--json writes the rows as wkv7_cpu.json into FOLDER. Exits with 1 when a ratio is below its target.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from trihybrid.ops.wkv7 import wkv7

# (batch, time, heads, width) and repetitions. The targets hold for the long sequences; the others are shapes of small
# training runs. The reference takes half a minute and 5 GB for one repetition of the largest.
SHAPES = {(1, 2048, 8, 64): 5, (1, 2048, 32, 128): 2, (16, 256, 8, 16): 5, (16, 256, 8, 32): 5}
TARGETS = {"forward": 1.8, "forward+backward": 5.0}
BACKENDS = ("reference", "chunked")


def make_inputs(batch: int, time_steps: int, heads: int, width: int) -> list[torch.Tensor]:
    """r, log_w, k, v, a, b and the state, as RWKV-7 makes them, float32, all wanting gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(batch, time_steps, heads, width, generator=generator)

    unit_key = torch.nn.functional.normalize(normal(), dim=-1)
    iclr = torch.sigmoid(normal())
    log_w = -0.6065 * torch.sigmoid(normal())
    state = torch.randn(batch, heads, width, width, generator=generator)
    tensors = [normal(), log_w, 0.3 * normal(), normal(), -unit_key, unit_key * iclr, state]
    return [x.requires_grad_() for x in tensors]


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """norm(x - reference) / norm(reference)."""
    return ((x - reference).norm() / reference.norm()).item()


def measure(shape: tuple[int, int, int, int], repetitions: int, threads: int) -> list[dict]:
    """Two rows, forward and forward+backward, for one shape."""
    clock = time.process_time if threads == 1 else time.perf_counter
    tensors = make_inputs(*shape)
    weight = torch.randn(tensors[3].shape, generator=torch.Generator().manual_seed(1))
    times: dict[tuple[str, str], list[float]] = {(p, b): [] for p in TARGETS for b in BACKENDS}
    outputs: dict[str, torch.Tensor] = {}
    gradients: dict[str, tuple[torch.Tensor, ...]] = {}
    for backend in BACKENDS:
        wkv7(*(x[:, :64] for x in tensors[:6]), tensors[6], backend=backend)
    for _ in range(repetitions):
        for backend in BACKENDS:
            with torch.no_grad():
                start = clock()
                outputs[backend], _ = wkv7(*tensors, backend=backend)
                times["forward", backend].append(clock() - start)
            start = clock()
            o, final = wkv7(*tensors, backend=backend)
            gradients[backend] = torch.autograd.grad((o * weight).sum() + final.sum(), tensors)
            times["forward+backward", backend].append(clock() - start)
            del o, final
    errors = {
        "forward": relative_error(outputs["chunked"], outputs["reference"]),
        "forward+backward": max(
            relative_error(x, y) for x, y in zip(gradients["chunked"], gradients["reference"], strict=True)
        ),
    }
    batch, time_steps, heads, width = shape
    rows = []
    for part, target in TARGETS.items():
        reference, chunked = (statistics.median(times[part, backend]) for backend in BACKENDS)
        rows.append(
            {
                "benchmark": "wkv7_cpu",
                "batch": batch,
                "time": time_steps,
                "heads": heads,
                "width": width,
                "pass": part,
                "threads": threads,
                "clock": clock.__name__,
                "repetitions": repetitions,
                "reference_ms": 1e3 * reference,
                "chunked_ms": 1e3 * chunked,
                "ratio": reference / chunked,
                "target_ratio": target if batch == 1 else None,
                "relative_rms_error": errors[part],
                "torch": torch.__version__,
            }
        )
    return rows


def main() -> int:
    """Run all shapes, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="WKV-7 on a CPU: chunked beside the reference.")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--repetitions", type=int, help="timed repetitions (default 2 or 5, by shape)")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write wkv7_cpu.json into this folder")
    arguments = parser.parse_args()
    for name in ("threads", "repetitions"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; expected at least 1")
    torch.set_num_threads(arguments.threads)

    kind = "CPU time" if arguments.threads == 1 else "wall time"
    print(f"{kind}, {arguments.threads} thread(s), float32, medians")
    print("| B, T, H, D | pass | reference ms | chunked ms | ratio | target | rms error |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for shape, repetitions in SHAPES.items():
        for row in measure(shape, arguments.repetitions or repetitions, arguments.threads):
            rows.append(row)
            target = "-" if row["target_ratio"] is None else f"{row['target_ratio']:.1f}"
            print(
                f"| {', '.join(map(str, shape))} | {row['pass']} | {row['reference_ms']:.0f} "
                f"| {row['chunked_ms']:.1f} | {row['ratio']:.1f} | {target} | {row['relative_rms_error']:.1e} |",
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.mkdir(parents=True, exist_ok=True)
        (arguments.json / "wkv7_cpu.json").write_text(json.dumps(rows, indent=2) + "\n")
    missed = [row for row in rows if row["target_ratio"] is not None and row["ratio"] < row["target_ratio"]]
    for row in missed:
        print(
            f"missed: {row['pass']} at H={row['heads']} D={row['width']} is {row['ratio']:.2f} times the reference, "
            f"the target is {row['target_ratio']}",
            file=sys.stderr,
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
