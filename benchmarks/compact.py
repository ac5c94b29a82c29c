"""Compact models by the clock: each row trains a recipe, packs it, reads it back and scores it.

    python benchmarks/compact.py ROW[@SEED]... --corpus FOLDER [--out FOLDER] [--seconds 120] [--profile]

FOLDER of the corpus holds text (train*.jsonl.xz, val.jsonl.xz) and a SentencePiece model, or what `trihybrid data` made
of them. Every call first times steps of the stock baseline on the same chip, the yardstick that its rows are printed
against, and the chip's own matrix product. Then it trains the rows one after another, alone on the chip, and packs and
scores them all at once. A row is left in the folder of --out as JSON; `python benchmarks/results.py` merges them into
docs/results.md. A row that fails is named, and the exit code is 1.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trihybrid.data.corpus import CorpusSection, prepare_corpus
from trihybrid.data.packing import PackedBatches
from trihybrid.export.bundle import bundle_size
from trihybrid.models.compact import CompactModel
from trihybrid.pretrain.compact import CompactTask
from trihybrid.recipe.compact import CompactRecipe, read_compact
from trihybrid.recipe.execute_compact import execute_compact
from trihybrid.recipe.fields import dump_recipe
from trihybrid.recipe.train_compact import train_compact
from trihybrid.train import build_optimizer

RECIPES = Path(__file__).parents[1] / "recipes"
YARDSTICK = "dense-9x512"


def steps(count: int, *others: str) -> list[str]:
    """Overrides for a run of so many steps, whatever the time."""
    return ["train.loop.seconds=null", f"train.loop.steps={count}", *others]


SMALL = "train.loop.batch_size=128"

ROWS: dict[str, tuple[str, list[str]]] = {
    "dense-9x512": ("dense-9x512", []),
    "dense-9x512-393": ("dense-9x512", steps(393)),
    "seed-1007": ("seed-1007", []),
    "seed-1007-reset": ("seed-1007-reset", []),
    "dense-11": ("dense-11", []),
    "compact-best": ("compact-best", []),
    "compact-rwkv7": ("compact-rwkv7", []),
    # As many steps as dense-11 makes in 120 s.
    "compact-best-2640": ("compact-best", steps(2640)),
    # The seed author's claims, at equal steps: one token back is enough, U-Net skips hurt, the hybrid gains a step.
    "seed-1007-400": ("seed-1007", steps(400, SMALL)),
    "seed-1007-400-back3": ("seed-1007", steps(400, SMALL, "model.legend.T={mixer: token_shift, back: 3}")),
    "seed-1007-400-back5": ("seed-1007", steps(400, SMALL, "model.legend.T={mixer: token_shift, back: 5}")),
    "seed-1007-400-unet": ("seed-1007", steps(400, SMALL, "model.skips=unet")),
    "seed-1007-400-dense": ("seed-1007", steps(400, SMALL, "model.pattern=F * 11")),
}


@dataclass(frozen=True)
class Trained:
    """A row between its training and its score, which another process makes."""

    row: str
    chosen: CompactRecipe
    folder: Path
    memory_bytes: int


def main() -> int:
    """Run the rows of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW[@SEED]", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rows/compact"))
    parser.add_argument("--runs", type=Path, help="keep the run directories here")
    parser.add_argument("--seconds", type=float, help="training time of rows by the clock")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], help="a field of every row's recipe"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step of each row")
    given = parser.parse_args()
    unknown = [row for row in given.rows if row.partition("@")[0] not in ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]}; rows are {', '.join(ROWS)}")
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as scratch:
        corpus = tokens(given.corpus, Path(scratch) / "tokens")
        peak = matmul_rate()
        yardstick = step_time(recipe(YARDSTICK, [], corpus))
        print(
            f"matrix product {peak / 1e12:.0f} TFLOP/s; {YARDSTICK}: {1e3 * yardstick:.1f} ms a step",
            flush=True,
        )
        trained, failed = [], []
        for row in given.rows:
            chosen = row_recipe(row, given.overrides, given.seconds, corpus)
            try:
                if given.profile:
                    profile(chosen)
                trained.append(train(row, chosen, (given.runs or Path(scratch)) / row))
            except Exception:  # a row must not cost the others, which take minutes each
                failed.append(row)
                traceback.print_exc()
        given.out.mkdir(parents=True, exist_ok=True)
        failed += score(trained, yardstick, peak, given.out)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def row_recipe(row: str, overrides: list[str], seconds: float | None, corpus: Path) -> CompactRecipe:
    """The recipe of ROW or ROW@SEED."""
    name, _, seed = row.partition("@")
    source, changes = ROWS[name]
    chosen = recipe(source, [*changes, *overrides, *([f"train.loop.seed={seed}"] if seed else [])], corpus)
    if seconds is not None and chosen.train.loop.seconds is not None:
        chosen.train.loop.seconds = seconds
    return chosen


def tokens(corpus: Path, folder: Path) -> Path:
    """The corpus as shards, made once a call unless it is shards already."""
    if (corpus / "train" / "manifest.json").is_file():
        return corpus
    model = next(iter(sorted(corpus.glob("*.model"))), None)
    if model is None:
        raise SystemExit(f"{corpus} holds no SentencePiece .model")
    held = corpus / "val.jsonl.xz"
    section = CorpusSection(train=str(corpus), validation=str(held), tokenizer=str(model))
    began = time.perf_counter()
    made = prepare_corpus(section, folder, processes=torch.get_num_threads())
    made.tokenizer.save(folder)
    seconds = time.perf_counter() - began
    print(
        f"{len(made.train):,} training and {len(made.validation):,} validation tokens in {seconds:.0f} s",
        flush=True,
    )
    return folder


def recipe(name: str, changes: list[str], corpus: Path) -> CompactRecipe:
    """A shipped recipe on these shards, with changes."""
    place = [f"data.train={corpus}", f"data.tokenizer={corpus}"]
    return read_compact(RECIPES / f"{name}.yaml", [*place, *changes])


def train(row: str, chosen: CompactRecipe, folder: Path) -> Trained:
    """Train a row, alone on the chip."""
    torch.cuda.reset_peak_memory_stats()
    summary = train_compact(chosen, folder)
    memory = torch.cuda.max_memory_allocated()
    print(f"{row}: {summary.steps} steps in {summary.seconds:.1f} s, loss {summary.loss:.4f}", flush=True)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return Trained(row, chosen, folder, memory)


def score(trained: list[Trained], yardstick: float, peak: float, out: Path) -> list[str]:
    """Finish rows side by side, each in a process; the names of those that failed."""
    if not trained:
        return []
    failed = []
    threads = max(1, torch.get_num_threads() // len(trained))
    with ProcessPoolExecutor(len(trained), multiprocessing.get_context("spawn")) as pool:
        rows = {pool.submit(finish, done, yardstick, peak, threads): done.row for done in trained}
        for future in as_completed(rows):
            try:
                measured = future.result()
            except Exception:
                failed.append(rows[future])
                traceback.print_exc()
                continue
            name = rows[future].replace("@", "-seed")
            (out / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")
            print(line(measured), flush=True)
    return failed


def finish(done: Trained, yardstick: float, peak: float, threads: int) -> dict[str, Any]:
    """Pack, reload, score: what results.json says, and what the row adds to it."""
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(threads)
    chosen = done.chosen
    results = execute_compact(chosen, done.folder, resume=True, code_bytes=bundle_size(dump_recipe(chosen)))
    assert results is not None
    loop = chosen.train.loop
    with torch.device("meta"):
        model = CompactModel(chosen.model, 1024)
    # A token sees half a row on average; the backward pass costs twice the forward.
    flops = 3 * model.cost(loop.sequence_length // 2).flops * loop.batch_size * loop.sequence_length
    return {
        "row": done.row,
        "tokens_per_step": loop.batch_size * loop.sequence_length,
        "yardstick_ms": 1e3 * yardstick,
        "matmul_flops": peak,
        "model_flops_utilisation": flops / (results["ms_per_step"] / 1e3) / peak,
        "isolated": chosen.evaluation.isolated,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "memory_bytes": done.memory_bytes,
        **results,
    }


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    bpb = row["bpb"]
    sliding = "" if bpb["sliding"] is None else f" (sliding {bpb['sliding']['decoded']:.4f})"
    # Not known of a part of the text.
    raw = "" if bpb["chunked"]["raw"] is None else f", raw {bpb['chunked']['raw']:.4f}"
    return (
        f"{row['row']}: {row['parameters']:,} parameters, {row['steps']} steps of {row['tokens_per_step']:,} tokens, "
        f"{row['ms_per_step']:.1f} ms a step (yardstick {row['yardstick_ms']:.1f}), "
        f"{100 * row['model_flops_utilisation']:.0f} % of the matrix product; "
        f"bpb {bpb['chunked']['decoded']:.4f}{sliding}{raw}, gap {row['gap']:+.4f}; "
        f"{row['total_bytes']:,} bytes; {row['memory_bytes'] / 2**30:.1f} GiB"
    )


def matmul_rate() -> float:
    """FLOP/s of a large bfloat16 matrix product on random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [timed(lambda: a @ b) for _ in range(12)]
    return 2 * 8192**3 / statistics.median(times[2:])


def timed(call: Any) -> float:
    """Seconds of a call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def stepper(chosen: CompactRecipe) -> Any:
    """A function that makes one whole training step on one and the same batch."""
    torch.manual_seed(0)
    corpus = prepare_corpus(chosen.data, Path(tempfile.gettempdir()) / "unused")
    model = CompactModel(chosen.model, corpus.tokenizer.vocab_size)
    model.initialise()
    model.cuda()
    model.compute_dtype = torch.bfloat16
    task, loop = CompactTask(model, chosen.train), chosen.train.loop
    optimizers = build_optimizer(task.parameters(), task.roles(), chosen.train.optimizer)
    batch = PackedBatches(corpus.train, loop.sequence_length, loop.batch_size, 0).batch(0).to("cuda")
    parts = task.split(batch, loop.accumulate)

    def step() -> None:
        for part in parts:
            task.differentiate(part, 1 / len(parts))
        optimizers.step()
        optimizers.zero_grad()

    return step


def step_time(chosen: CompactRecipe) -> float:
    """Median seconds of a step once the chip has worked for some seconds: a cool one is faster."""
    step = stepper(chosen)
    times = [timed(step) for _ in range(50)]
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return statistics.median(times[20:])


def profile(chosen: CompactRecipe) -> None:
    """Print where the device spends a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    step = stepper(chosen)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    print(f"{chosen.name}: kernels of a step")
    print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=90))


if __name__ == "__main__":
    sys.exit(main())
