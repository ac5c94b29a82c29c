"""The same conversion on one GPU, on two with all weights each, on two that share them out, and on two that share rows:
losses, speed, memory.

    python benchmarks/distill_two_gpus.py [--stages match,align] [--forms one,replicate,shard,context,resume]
        [--steps 12] [--rows 8] [--length 2048] [--tiny] [--json FOLDER]
    python benchmarks/distill_two_gpus.py --forms one,context --rows 1 --length 32768

Ten layers in the width of Gemma-4 E2B with a vocabulary of 32,768 words, random weights in bfloat16; the student is the
card's, RWKV-7 + TICA in the global layers. A step has the same rows in every form, so two GPUs have half of them each,
and in `context` half of the tokens of each. torchrun starts two processes, which train one form after the other: `one`
by the first of them alone, `replicate`, `shard` and `context` by both, and `resume` by the first alone, from the
checkpoint that `shard` wrote half-way. Figures are read from the logs: speed is the median of all steps but the first
two, "at rest" what the first GPU has allocated before the first step, peak the most after that. --tiny runs all of it
in a tiny shape on a CPU (gloo). --json writes the rows as distill_two_gpus.json into FOLDER. The exit code is 1 where a
form fails, or a loss differs from that of one GPU by more than one part in a hundred, on a CPU in a hundred thousand.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distill_e2b_models import Setting, build_pair, clear, e2b, tiny
from transformers import Gemma4TextConfig

from trihybrid.data import Batch
from trihybrid.distill.align import AlignTask
from trihybrid.distill.match import Matching, MatchTask
from trihybrid.run import RunLog, read_log
from trihybrid.train import Checkpoints, TrainSection, Workers, fit, process_group

GIB = 2**30
FORMS = {"one": 1, "replicate": 2, "shard": 2, "context": 2, "resume": 1}
"""Name of a form -> processes that train."""
LIMIT = {"cpu": 300.0, "cuda": 115.0}
"""Seconds after which all is ended: processes that wait for each other wait for long."""
WARM = 2

Row = dict[str, Any]


def main() -> int:
    """Run all forms, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="match,align", help="some of match,align")
    parser.add_argument("--forms", default=",".join(FORMS), help="some of these, `one` among them")
    parser.add_argument("--steps", type=int, default=12, help="steps of a run, even, 4 at least")
    parser.add_argument(
        "--rows", type=int, default=8, help="rows of a step, of all GPUs together, even (1 for one,context)"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row, even")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on CPUs")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="only train, as one of the workers")
    given = parser.parse_args()
    forms = [form for form in FORMS if form in given.forms.split(",")]
    unknown = len(forms) < len(given.forms.split(","))
    if unknown or "one" not in forms or ("resume" in forms and "shard" not in forms):
        parser.error(
            f"--forms {given.forms}: some of {', '.join(FORMS)}; `one` among them, `resume` with `shard`"
        )
    if given.train:
        train(given)
        return 0
    if not given.tiny and torch.cuda.device_count() < 2:
        parser.error("fewer than two GPUs here; --tiny runs a tiny shape on CPUs")
    with tempfile.TemporaryDirectory() as scratch:
        start(Path(scratch))
        size = {"rows": given.rows, "length": given.length}
        rows = [row | size for row in read_rows(given.stages.split(","), forms, Path(scratch))]
    table(rows)
    if given.json is not None:
        given.json.mkdir(parents=True, exist_ok=True)
        (given.json / "distill_two_gpus.json").write_text(json.dumps(rows, indent=2) + "\n")
    limit = 1e-5 if given.tiny else 1e-2
    missed = [row for row in rows if row.get("apart", 1.0) > limit]
    for row in missed:
        print(f"missed: {row['stage']} {row['form']}: {row.get('apart', 'no figures; see above')}")
    return 1 if missed else 0


def start(scratch: Path) -> None:
    """Let torchrun start this file twice, to train."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, __file__, *sys.argv[1:], "--train", str(scratch)]
    tiny_shape = "--tiny" in sys.argv
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if tiny_shape else {}
    process = subprocess.Popen(command, env={**os.environ, **hidden})
    try:
        process.wait(LIMIT["cpu" if tiny_shape else "cuda"])
    except subprocess.TimeoutExpired:
        # torchrun ends its processes too.
        process.terminate()
        process.wait()


def train(given: argparse.Namespace) -> None:
    """Train all forms as one of two workers."""
    with process_group("cpu" if given.tiny else "cuda") as workers:
        setting = replace(tiny() if given.tiny else ten_layers(), device=workers.device)
        for stage in given.stages.split(","):
            for form in (form for form in FORMS if form in given.forms.split(",")):
                clear()
                try:
                    if FORMS[form] == 2:
                        train_form(given, stage, form, workers, setting)
                    elif workers.first:
                        train_form(given, stage, form, Workers(device=workers.device), setting)
                except Exception:
                    # The other forms are worth having.
                    traceback.print_exc()
                workers.wait()


def ten_layers() -> Setting:
    """Ten layers as E2B's; the last four share keys and values, as its upper twenty do."""
    setting = e2b()
    base = Gemma4TextConfig(
        vocab_size=32768, vocab_size_per_layer_input=32768, hidden_size=1536, intermediate_size=6144,
        num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=1, head_dim=256, global_head_dim=512,
        sliding_window=512, layer_types=[*["sliding_attention"] * 4, "full_attention"] * 2, num_kv_shared_layers=4,
        use_double_wide_mlp=True, hidden_size_per_layer_input=256, final_logit_softcapping=30.0,
        max_position_embeddings=131072, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return replace(setting, base=base)


def train_form(given: argparse.Namespace, stage: str, form: str, workers: Workers, setting: Setting) -> None:
    """Train one form of a stage and leave its figures."""
    gpu = workers.device.type == "cuda"
    if form == "context":
        workers = replace(workers, context=2)
    pair = build_pair(setting, workers.part())
    if form == "shard":
        pair.to("cpu")
    if stage == "align":
        task: AlignTask | MatchTask = AlignTask(pair)
    else:
        task = MatchTask(Matching(pair, chunk=setting.chunk, block=setting.block, checkpointing=True))
    if form == "shard":
        task.shard(workers)
    clear()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    rest = torch.cuda.memory_allocated() if gpu else 0
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
        tokens_BT = torch.randint(3, setting.base.vocab_size, shape, generator=generator)
        tokens_BT = tokens_BT[workers.share :: workers.shares]
        whole = Batch(tokens_BT, torch.arange(given.length + 1).expand(len(tokens_BT), -1))
        return whole.part(workers.rank % workers.context, workers.context).to(workers.device)

    folder = given.train / form / stage
    folder.mkdir(parents=True, exist_ok=True)
    if form == "resume":
        # One process goes on where two were half-way; their last checkpoint is not to be seen.
        half = Path("checkpoints") / f"step-{given.steps // 2:06d}"
        (folder / half).parent.mkdir()
        (given.train / "shard" / stage / half).rename(folder / half)
    checkpoints = Checkpoints(folder / "checkpoints", stage, "random")
    log = RunLog(folder / "log.jsonl", stage, every=given.steps) if workers.first else None
    fit(task, batch, section, checkpoints, log, True, workers)
    if workers.first:
        taken = [row for row in read_log(folder / "log.jsonl") if row["kind"] == "train"]
        figures = {
            "first": taken[0]["step"],
            "losses": [row["loss"] for row in taken],
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in taken[WARM:] or taken),
            "rest_gib": rest / GIB,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if gpu else 0.0,
        }
        (folder / "figures.json").write_text(json.dumps(figures))
        print(stage, form, json.dumps(figures), flush=True)


def read_rows(stages: list[str], forms: list[str], scratch: Path) -> Iterator[Row]:
    """A row for each stage and form; without figures where it failed."""
    for stage in stages:
        wanted: list[float] = []
        alone = 1.0
        for form in forms:
            row: Row = {"benchmark": "distill_two_gpus", "stage": stage, "form": form, "gpus": FORMS[form]}
            found = scratch / form / stage / "figures.json"
            if found.exists():
                row |= json.loads(found.read_text())
                if not wanted:
                    wanted, alone = row["losses"], row["tokens_per_second"]
                pairs = zip(row["losses"], wanted[row["first"] :], strict=True)
                row |= {"last": row["losses"][-1], "ratio": row["tokens_per_second"] / alone}
                row["apart"] = max(abs(loss / other - 1) for loss, other in pairs)
            yield row


def table(rows: list[Row]) -> None:
    """A line a row, with its first, middle and last loss."""
    print(
        "| stage | form | GPUs | first loss | middle | last | apart | tok/s | ratio | at rest GiB | peak GiB |"
    )
    print(f"|{'---|' * 11}")
    for row in rows:
        if "losses" not in row:
            print(f"| {row['stage']} | {row['form']} | {row['gpus']} | failed |")
            continue
        losses = row["losses"]
        cells = [f"{losses[place]:.6f}" for place in (0, len(losses) // 2, -1)]
        cells += [f"{row['apart']:.1e}", f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}"]
        cells += [f"{row['rest_gib']:.2f}", f"{row['peak_gib']:.2f}"]
        print(f"| {row['stage']} | {row['form']} | {row['gpus']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
