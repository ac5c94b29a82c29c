"""What a step of distillation costs in the true shape of Gemma-4 E2B, beside two models with a dense KL in one run.

    python benchmarks/distill_e2b.py [--parts align,match,long,dense] [--kept 8,10,12,16] [--tables device|host]
        [--steps 5] [--profile] [--tiny] [--json FOLDER]

One GPU, bfloat16, random weights, rows without padding or borders; forward, backward, clipping and AdamW on float32
master weights of the new mixers. `align` is stage 1; `long` stage 2 at 32,768 tokens with all layers recomputed;
`match` stage 2 at 4,096, once kernel by kernel, and as a CUDA graph for each number of layers in --kept that are not
recomputed; `dense` stage 2 as two models, all logits at once and every layer recomputed. With --tables host the
per-layer table stays in host memory, but for `dense`. Batches are made ahead by another thread, as in training. Peak is
all that was allocated, weights and optimizer included; with a graph all that is reserved, which is a little more. The
utilisation (MFU) is of the bfloat16 matrix product of the same run; model FLOPs count the matrix products of both
forward passes, of the gradients of what the student computes, and of those of the mixers' weights; nothing for what is
recomputed. --profile prints the kernels that take most of a step. --tiny runs all of it in a tiny shape on a CPU.
--json writes the rows as distill_e2b.json into FOLDER. Exits with 1 when a target is missed: 40,000 tok/s in stage 1;
18,000 tok/s in at most 24 GiB in stage 2; at most 60 GiB at length.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distill_e2b_models import Setting, TwoModels, build_pair, clear, e2b, smaller, tiny
from torch import Tensor, nn

from trihybrid.data import Batch, Prefetch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.host_table import leave_tables
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.distill.pair import Pair
from trihybrid.distill.task import LossTask
from trihybrid.surgery.cost import account
from trihybrid.surgery.layout import student_config
from trihybrid.train.optim import build_optimizer
from trihybrid.train.section import OptimizerSection

Row = dict[str, Any]
Step = Callable[[], Tensor]

PARTS = ("align", "match", "long", "dense")
GIB = 2**30
ALIGN_SPEED, MATCH_SPEED, MATCH_GIB, LONG_GIB = 40_000, 18_000, 24.0, 60.0


def main() -> int:
    """Measure, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="The cost of a distillation step.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--kept", help="layers that stage 2 does not recompute, a row for each number")
    parser.add_argument("--tables", choices=("device", "host"), default="device", help="where tables lie")
    parser.add_argument("--steps", type=int, help="timed steps of a row")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on a CPU")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if wrong := set(parts) - set(PARTS):
        parser.error(f"--parts has {', '.join(sorted(wrong))}; expected some of {', '.join(PARTS)}")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("no GPU here; --tiny runs a tiny shape on a CPU")
    kept = tuple(int(number) for number in arguments.kept.split(",")) if arguments.kept else None
    setting = smaller(tiny() if arguments.tiny else e2b(), kept, arguments.steps)
    ceiling = None if arguments.tiny else matrix_product()
    name = (
        "CPU" if ceiling is None else f"{torch.cuda.get_device_name()}, product {ceiling / 1e12:.0f} TFLOP/s"
    )
    print(f"{name}, torch {torch.__version__}", flush=True)
    rows: list[Row] = []
    for row in measure(setting, parts, arguments.profile, arguments.tables):
        if ceiling is not None and "ms" in row:
            row["mfu"] = row["flops"] / (1e-3 * row["ms"]) / ceiling
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.json is not None:
            arguments.json.mkdir(parents=True, exist_ok=True)
            (arguments.json / "distill_e2b.json").write_text(json.dumps(rows, indent=2) + "\n")
    table(rows)
    missed = [] if arguments.tiny else list(targets(rows))
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


def measure(setting: Setting, parts: list[str], profile: bool, tables: str = "device") -> Iterator[Row]:
    """The rows, as they come. A form that fails is a row that says so."""
    if set(parts) & {"align", "match", "long"}:
        pair = build_pair(setting)
        if tables == "host":
            leave_tables(pair.student, setting.device)
            clear()
        if "align" in parts:
            yield row_of(setting, "align", AlignTask(pair), {"tables": tables}, profile)
        if "long" in parts:
            options = {"kept": 0, "graph": False, "tables": tables}
            yield row_of(setting, "long", MatchTask(matching(setting, pair, 0)), options, False)
        graphs = setting.device.type == "cuda"
        ways = [(setting.kept[0], False)] * graphs + [(kept, graphs) for kept in setting.kept]
        for kept, graph in ways if "match" in parts else ():
            task = MatchTask(matching(setting, pair, kept), graph)
            shown = profile and (kept, graph) == ways[-1]
            options = {"kept": kept, "graph": graph, "tables": tables}
            yield row_of(setting, "match", task, options, shown)
            del task
        del pair
        clear()
    if "dense" in parts:
        yield row_of(setting, "dense", DenseTask(TwoModels(setting)), {}, False)


def matching(setting: Setting, pair: Pair, kept: int) -> Matching:
    """Stage 2 with `kept` layers that are not recomputed."""
    return Matching(pair, chunk=setting.chunk, block=setting.block, checkpointing=True, kept_layers=kept)


class DenseTask:
    """Two models as the tasks of distillation."""

    def __init__(self, models: TwoModels) -> None:
        self.models = models

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.models.trained

    def roles(self) -> dict[str, str]:
        return dict.fromkeys(self.models.trained, "matrix")

    def complete(self, batch: Batch) -> Batch:
        return batch

    def differentiate(self, batch: Batch, share: float) -> tuple[Tensor, Mapping[str, Any]]:
        loss, parts = self.models(batch.inputs, batch.positions)
        (share * loss).backward()
        return loss.detach(), parts


def row_of(setting: Setting, part: str, task: LossTask | DenseTask, options: Row, profile: bool) -> Row:
    """Time of a step, its memory and its loss before the first update."""
    clear()
    rows, length = shape = {"align": setting.align, "long": setting.long}.get(part, setting.match)
    row: Row = {"benchmark": "distill_e2b", "part": part, "rows": rows, "length": length, **options}
    gpu = setting.device.type == "cuda"
    trained = task.parameters()
    saved = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
    optimizer = build_optimizer(trained, task.roles(), OptimizerSection(learning_rate=1e-5))
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(3, setting.base.vocab_size, (rows, length + 1), generator=generator)
    batch = Batch(tokens_BT, torch.arange(length + 1).expand(rows, -1))
    batches = Prefetch(lambda _: task.complete(batch), device=setting.device)
    numbers = itertools.count()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss, _ = task.differentiate(batches(next(numbers)), 1.0)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        return loss

    try:
        row["loss"] = float(step())
        if gpu:
            step()
            clear()
            torch.cuda.reset_peak_memory_stats()
        row["ms"] = milliseconds(step, setting)
        row["tokens_per_second"] = rows * length / (1e-3 * row["ms"])
        if gpu:
            # What a recording holds is reserved for it, and not allocated while it is replayed.
            peak = torch.cuda.max_memory_reserved if options.get("graph") else torch.cuda.max_memory_allocated
            row["peak_gib"] = peak() / GIB
        row["flops"] = model_flops(setting, part, shape, trained)
        if profile:
            print_kernels(part, step)
    except Exception as error:
        traceback.print_exc()
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        batches.close()
    # The next row begins with the same weights.
    for name, parameter in trained.items():
        parameter.data.copy_(saved[name])
        parameter.grad = None
    return row


def milliseconds(step: Step, setting: Setting) -> float:
    """Median time of a step."""
    times = []
    for _ in range(setting.steps):
        began = time.perf_counter()
        step()
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def model_flops(
    setting: Setting, part: str, shape: tuple[int, int], trained: dict[str, nn.Parameter]
) -> float:
    """Matrix-product FLOPs of a step; a token sees half of its row on average, or its window."""
    rows, length = shape
    seen = max(length // 2, 1)
    config = student_config(setting.base, setting.surgery)
    teacher, student = (account(setting.base, model, [seen]) for model in (None, config))
    theirs, ours = ([layer["flops"][str(seen)] for layer in side["layers"]] for side in (teacher, student))
    outside = teacher["flops_per_token"][str(seen)] - sum(theirs)
    head = 2 * setting.base.hidden_size * setting.base.vocab_size
    slots = config.slot_list()
    converted = [index for index, slot in enumerate(slots) if slot.converted]
    weights = 2 * sum(parameter.numel() for parameter in trained.values() if parameter.dim() == 2)
    if part == "align":
        # Forward, and for the mixers twice as much for gradients; their scores and states are small beside it.
        token = outside - head + sum(theirs[: converted[-1] + 1]) + 3 * weights
    else:
        above = sum(ours[converted[0] :])
        token = outside + sum(theirs) + 2 * above + 2 * head + weights
    return float(token * rows * length)


def matrix_product() -> float:
    """FLOP/s of a large bfloat16 product, the best of ten."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def print_kernels(part: str, step: Step) -> None:
    """The kernels that take most of a step, and how long the device does nothing."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profiled(activities=activities) as profiler:
        began = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        took = 1e3 * (time.perf_counter() - began)
    kernels = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels) / 1e3
    print(f"{part}: {took:.0f} ms under the profiler, {busy:.0f} ms of kernels")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:28]:
        print(f"  {event.self_device_time_total / 1e3:8.2f} ms {event.count:6d} x {event.key[:110]}")


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    name: str
    form: str


COLUMNS = (
    Column("part", "part", "{}"), Column("rows", "rows", "{}"), Column("tokens", "length", "{:,}"),
    Column("layers kept", "kept", "{}"), Column("graph", "graph", "{}"), Column("tables", "tables", "{}"),
    Column("ms a step", "ms", "{:.1f}"),
    Column("tok/s", "tokens_per_second", "{:,.0f}"), Column("peak GiB", "peak_gib", "{:.1f}"),
    Column("MFU", "mfu", "{:.0%}"), Column("loss", "loss", "{:.4f}"),
)  # fmt: skip


def table(rows: list[Row]) -> None:
    """All rows, and how many times the dense form's speed and memory the best of stage 2 is."""
    print(f"| {' | '.join(column.title for column in COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        cells = [column.form.format(row[column.name]) if column.name in row else "" for column in COLUMNS]
        print(f"| {' | '.join(cells)} | {row.get('failed', '')}".rstrip(" |") + " |")
    dense = [row for row in rows if row["part"] == "dense" and "ms" in row]
    match = [row for row in rows if row["part"] == "match" and "ms" in row]
    if dense and match:
        best = max(match, key=lambda row: row["tokens_per_second"])
        print(f"stage 2 is {dense[0]['ms'] / best['ms']:.2f} times as fast as two models with a dense KL")


def targets(rows: list[Row]) -> Iterator[str]:
    """A line for every target that is missed."""
    yield from (f"{row['part']}: {row['failed']}" for row in rows if "failed" in row)
    done = [row for row in rows if "failed" not in row]
    for row in done:
        if row["part"] == "align" and row["tokens_per_second"] < ALIGN_SPEED:
            yield f"stage 1: {row['tokens_per_second']:,.0f} tok/s, the target is {ALIGN_SPEED:,}"
        if row["part"] == "long" and row["peak_gib"] > LONG_GIB:
            yield f"stage 2 at {row['length']:,} tokens: {row['peak_gib']:.1f} GiB, at most {LONG_GIB:.0f}"
    match = [row for row in done if row["part"] == "match"]
    fitting = [row["tokens_per_second"] for row in match if row["peak_gib"] <= MATCH_GIB]
    if match and max(fitting, default=0.0) < MATCH_SPEED:
        yield (
            f"stage 2: {max(fitting, default=0.0):,.0f} tok/s in {MATCH_GIB:.0f} GiB, the target is {MATCH_SPEED:,}"
        )


if __name__ == "__main__":
    sys.exit(main())
