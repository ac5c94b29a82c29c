"""The same conversion on one GPU, on two with all weights each, and on two that share them out: losses, speed, memory.

    python benchmarks/distill_two_gpus.py [--stages match,align] [--steps 12] [--rows 8] [--length 2048] [--tiny]
        [--json FOLDER]

Ten layers in the width of Gemma-4 E2B with a vocabulary of 32,768 words, random weights in bfloat16; the student is the
card's, RWKV-7 + TICA in the global layers. A step has the same rows in every form, so two GPUs have half of them each.
Each form trains in processes of its own, those of two GPUs under torchrun; the last one goes on by itself from the
checkpoint that two processes with shared weights wrote half-way. Figures are read from the logs: speed is the median of
all steps but the first; "at rest" what the first GPU has allocated before the first step, peak the most after that.
--tiny runs all of it in a tiny shape on CPUs (gloo). --json writes the rows as distill_two_gpus.json into FOLDER. The
exit code is 1 where a loss differs from that of one GPU by more than one part in a hundred, on a CPU in a hundred
thousand.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distill_e2b_models import Setting, build_pair, clear, e2b, tiny

from trihybrid.data import Batch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.run import RunLog, read_log
from trihybrid.train import Checkpoints, TrainSection, Workers, fit, process_group

GIB = 2**30
FORMS = {"one": 1, "replicate": 2, "shard": 2, "resume": 1}
"""Name of a form -> processes; `resume` is one that goes on from what `shard` left half-way."""

LIMIT = 200.0
"""Seconds after which a form has failed: processes that wait for each other wait for long."""

Row = dict[str, Any]


def main() -> int:
    """Run all forms, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="match,align", help="some of match,align")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run, even")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, of all GPUs together")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on CPUs")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    parser.add_argument("--train", type=Path, metavar="RUN", help="only train, as one of the workers")
    parser.add_argument("--form", choices=list(FORMS), help="of what --train trains")
    given = parser.parse_args()
    if given.train:
        train(given)
        return 0
    if not given.tiny and torch.cuda.device_count() < 2:
        parser.error("fewer than two GPUs here; --tiny runs a tiny shape on CPUs")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for form, count in FORMS.items():
            rows += start(given, form, count, Path(scratch))
    table(rows)
    if given.json is not None:
        given.json.mkdir(parents=True, exist_ok=True)
        (given.json / "distill_two_gpus.json").write_text(json.dumps(rows, indent=2) + "\n")
    missed = [row for row in rows if "failed" in row or row["apart"] > (1e-5 if given.tiny else 1e-2)]
    for row in missed:
        print(f"missed: {row['stage']} {row['form']}: {row.get('failed') or row['apart']}")
    return 1 if missed else 0


def start(given: argparse.Namespace, form: str, count: int, scratch: Path) -> list[Row]:
    """Train one form in processes of its own; a row for each stage."""
    began = time.perf_counter()
    launch = [sys.executable]
    if count > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    sizes = [f"--{name}={getattr(given, name)}" for name in ("stages", "steps", "rows", "length")]
    command = [*launch, __file__, "--train", str(scratch), "--form", form, *sizes]
    if given.tiny:
        command.append("--tiny")
    seen = "" if given.tiny else ",".join(map(str, range(count)))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": seen}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        done = process.wait(LIMIT) == 0
    except subprocess.TimeoutExpired:
        # torchrun ends its processes too.
        process.terminate()
        done = process.wait() == 0
    print(
        f"{form}: {count} process(es), {time.perf_counter() - began:.0f} s, {'done' if done else 'FAILED'}",
        flush=True,
    )
    rows = []
    for stage in given.stages.split(","):
        row: Row = {"benchmark": "distill_two_gpus", "stage": stage, "form": form, "gpus": count}
        found = scratch / form / stage / "figures.json"
        if found.exists():
            row |= json.loads(found.read_text())
            wanted = json.loads((scratch / "one" / stage / "figures.json").read_text())["losses"]
            row["apart"] = max(
                abs(loss / wanted[int(step)] - 1) for step, loss in enumerate(row["losses"], row["first"])
            )
        else:
            row["failed"] = "no figures; see above"
        rows.append(row)
    return rows


def train(given: argparse.Namespace) -> None:
    """Train the stages as one of the workers of a form."""
    setting = small(given)
    alone = Workers(device=setting.device)
    group = process_group(setting.device.type) if FORMS[given.form] > 1 else nullcontext(alone)
    with group as workers:
        for stage in given.stages.split(","):
            clear()
            train_stage(given, stage, workers, replace(setting, device=workers.device))


def small(given: argparse.Namespace) -> Setting:
    """Ten layers as E2B's first ones, four of which share keys and values; or the tiny shape."""
    if given.tiny:
        return replace(tiny(), dtype=torch.float32)
    setting = e2b()
    fields = setting.base.to_dict() | {
        "num_hidden_layers": 10,
        "layer_types": setting.base.layer_types[:10],
        "num_kv_shared_layers": 4,
        "vocab_size": 32768,
        "vocab_size_per_layer_input": 32768,
    }
    return replace(setting, base=type(setting.base)(**fields))


def train_stage(given: argparse.Namespace, stage: str, workers: Workers, setting: Setting) -> None:
    """Train one stage and leave its figures."""
    gpu = workers.device.type == "cuda"
    pair = build_pair(setting)
    if given.form == "shard":
        pair.to("cpu")
        clear()
    if stage == "align":
        task: AlignTask | MatchTask = AlignTask(pair)
    else:
        task = MatchTask(Matching(pair, chunk=setting.chunk, block=setting.block, checkpointing=True))
    if given.form == "shard":
        task.shard(workers)
    if gpu:
        clear()
        torch.cuda.reset_peak_memory_stats()
    rest = memory(gpu)
    section = TrainSection.model_validate(
        {
            "loop": {
                "steps": given.steps,
                "batch_size": given.rows,
                "checkpoint_every": given.steps // 2,
                "log_every": given.steps,
            },
            "optimizer": {"learning_rate": 1e-4},
            "schedule": {"kind": "constant"},
        }
    )

    def batch(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        shape = given.rows, given.length + 1
        tokens_BT = torch.randint(3, setting.base.vocab_size, shape, generator=generator)[
            workers.rank :: workers.count
        ]
        return Batch(tokens_BT, torch.arange(given.length + 1).expand(len(tokens_BT), -1)).to(workers.device)

    # One process goes on where two were half-way: their last checkpoint is not to be seen.
    folder = given.train / given.form / stage
    folder.mkdir(parents=True, exist_ok=True)
    if given.form == "resume":
        half = f"step-{given.steps // 2:06d}"
        (folder / "checkpoints").mkdir()
        (given.train / "shard" / stage / "checkpoints" / half).rename(folder / "checkpoints" / half)
    checkpoints = Checkpoints(folder / "checkpoints", stage, "random")
    log = RunLog(folder / "log.jsonl", stage, every=given.steps) if workers.first else None
    fit(task, batch, section, checkpoints, log, True, workers)
    peak = float(torch.cuda.max_memory_allocated()) if gpu else 0.0
    if workers.first:
        taken = [row for row in read_log(folder / "log.jsonl") if row["kind"] == "train"]
        figures = {
            "first": taken[0]["step"],
            "losses": [row["loss"] for row in taken],
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in taken[1:]),
            "rest_gib": rest / GIB,
            "peak_gib": peak / GIB,
        }
        (folder / "figures.json").write_text(json.dumps(figures))


def memory(gpu: bool) -> float:
    """Bytes of this GPU that are allocated."""
    return float(torch.cuda.memory_allocated()) if gpu else 0.0


def table(rows: list[Row]) -> None:
    """A line a row, with losses at three steps."""
    print(
        "| stage | form | GPUs | first loss | middle | last | apart | tok/s | ratio | at rest GiB | peak GiB |"
    )
    print(f"|{'---|' * 11}")
    for row in rows:
        if "failed" in row:
            print(f"| {row['stage']} | {row['form']} | {row['gpus']} | {row['failed']} |")
            continue
        one = next(r for r in rows if r["form"] == "one" and r["stage"] == row["stage"])
        losses = row["losses"]
        cells = [f"{losses[place]:.6f}" for place in (0, len(losses) // 2, -1)]
        rate = row["tokens_per_second"]
        cells += [f"{row['apart']:.1e}", f"{rate:,.0f}", f"{rate / one['tokens_per_second']:.2f}"]
        cells += [f"{row['rest_gib']:.2f}", f"{row['peak_gib']:.2f}"]
        print(f"| {row['stage']} | {row['form']} | {row['gpus']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
