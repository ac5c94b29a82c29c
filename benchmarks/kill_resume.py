"""Kill a conversion at random moments and resume it: the same end to the bit, and no token lost or repeated.

    python benchmarks/kill_resume.py [--kills 20] [--ranks 1 2] [--seed 0]

A small recipe (teacher, surgery, two stages, on text that every Python carries) runs undisturbed once for each number
of processes. Then it is started again, killed with SIGKILL at a moment drawn uniformly from the time that the
undisturbed run took, and resumed, until it has been killed so many times; a run that finishes before its kill is
compared, and a new one begun. With two processes every other kill takes one of them only, and torchrun has to end the
rest; in the first stage the two share out the weights. Compared are the bytes of all models, and of every step its
loss, gradient norm and count of tokens; each step must stand in the log once. The exit code is 1 where anything
differs. On a CPU only: a GPU's kernels need not be deterministic.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trihybrid.data import read_documents
from trihybrid.run import hash_file, read_log

DOCUMENTS = 100
LAST = 6000  # characters of a failed run that are shown
MODELS = ("teacher", "operated", "aligned", "matched")
RECIPE = """
name: kill-resume
data: {source: SOURCE, recall: {fraction: 0.3, pairs: 4, rounds: 3, evaluation_documents: 4}}
teacher:
  pretrain:
    shape: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 3, num_attention_heads: 2,
      num_key_value_heads: 1, head_dim: 8, global_head_dim: 16, sliding_window: 8,
      layer_types: [sliding_attention, full_attention, full_attention], num_kv_shared_layers: 1,
      hidden_size_per_layer_input: 8, final_logit_softcapping: 30.0, max_position_embeddings: 512}
    loop: {steps: 30, batch_size: 4, sequence_length: 64, checkpoint_every: 3, seed: 1, accumulate: 2}
    optimizer: {name: muon, learning_rate: 0.01}
surgery:
  rwkv7: {head_dim: 8, decay_rank: 4, iclr_rank: 4, gate_rank: 4}
  tica: {heads: 2, kv_heads: 1, head_dim: 8, gate_rank: 4}
  calibration_tokens: 256
stages:
  - {kind: align, parallel: shard, loop: {steps: 30, batch_size: 4, sequence_length: 32, checkpoint_every: 3, seed: 2}}
  - {kind: match, loop: {steps: 30, batch_size: 4, sequence_length: 32, checkpoint_every: 3, seed: 3}}
evaluation: {sequence_length: 64, batch_size: 4, validation_tokens: 400}
samples: {prompts: ["The "], tokens: 8}
"""


def main() -> int:
    """Kill and compare, for each number of processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    failed = False
    print("| processes | kills | runs finished | steps of each | tokens of each | differences |")
    print("|---|---|---|---|---|---|", flush=True)
    for ranks in given.ranks:
        with tempfile.TemporaryDirectory() as scratch:
            rows, runs, differences = disturb(Path(scratch), ranks, given.kills, random.Random(given.seed))
        tokens = sum(row["tokens"] for row in rows if row["step"] + 1 == row["steps"])
        print(
            f"| {ranks} | {given.kills} | {runs} | {len(rows)} | {tokens:,} | {len(differences)} |",
            flush=True,
        )
        for difference in differences:
            print(f"{ranks} processes: {difference}", file=sys.stderr)
        failed = failed or bool(differences)
    return int(failed)


def disturb(
    folder: Path, ranks: int, kills: int, chance: random.Random
) -> tuple[list[dict[str, Any]], int, list[str]]:
    """The steps of the undisturbed run, the number of runs that were finished, and what differed."""
    began = time.monotonic()
    finish(start(folder, "whole", ranks), folder / "whole.output")
    seconds = time.monotonic() - began
    done, runs, differences = 0, 0, []
    while done < kills or runs == 0 or (folder / str(runs)).exists():
        process = start(folder, str(runs), ranks)
        try:
            process.wait(chance.uniform(0.0, seconds) if done < kills else None)
        except subprocess.TimeoutExpired:
            kill(process, one=ranks > 1 and done % 2 == 1)
            done += 1
            print(f"{ranks} processes: kill {done} of run {runs}", file=sys.stderr, flush=True)
            continue
        finish(process, folder / f"{runs}.output")
        differences += [f"run {runs}: {found}" for found in compare(folder / str(runs), folder / "whole")]
        shutil.rmtree(folder / str(runs))
        runs += 1
    return steps(folder / "whole"), runs, differences


def start(folder: Path, name: str, ranks: int) -> subprocess.Popen[bytes]:
    """Start or resume a run, in a session of its own."""
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        texts = [json.dumps({"text": text}) for text in read_documents("builtin")[:DOCUMENTS]]
        (folder / "text.jsonl").write_text("\n".join(texts))
        recipe.write_text(RECIPE.replace("SOURCE", str(folder / "text.jsonl")))
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*launch, "trihybrid.cli", "distill", str(recipe), "--out", str(folder / name), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / f"{name}.output", "ab") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def kill(process: subprocess.Popen[bytes], one: bool) -> None:
    """SIGKILL to the process and all that it started, or (`one`) to a single one of these, and wait for the end."""
    children = descendants(process.pid)
    if one and children:
        send(children[-1])
    else:
        for number in [process.pid, *children]:
            send(number)
    process.wait(timeout=300)
    for number in children:
        while Path(f"/proc/{number}").exists() and state(number) != "Z":
            send(number)
            time.sleep(0.01)


def send(number: int) -> None:
    """SIGKILL, unless the process is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def descendants(number: int) -> list[int]:
    """The processes that a process started, and those that they started."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(folder.name))
    found = list(parents.get(number, []))
    for child in found:
        found += parents.get(child, [])
    return found


def state(number: int) -> str:
    """The state of a process as the kernel writes it; Z has ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def finish(process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for a process that must succeed; where it does not, show the end of what it printed."""
    if process.wait() != 0:
        end = output.read_text(errors="replace")[-LAST:]
        raise RuntimeError(f"{process.args} ended with exit code {process.returncode}:\n{end}")


def steps(run: Path) -> list[dict[str, Any]]:
    """The log's steps without what the machine's speed decides."""
    names = ("stage", "step", "steps", "loss", "gradient_norm", "tokens")
    return [{n: row[n] for n in names} for row in read_log(run / "log.jsonl") if row["kind"] == "train"]


def compare(run: Path, whole: Path) -> list[str]:
    """What a disturbed run has otherwise than the undisturbed one."""
    files = [f"{name}/model.safetensors" for name in MODELS] + ["data/train/manifest.json", "results.json"]
    found = [file for file in files if hash_file(run / file) != hash_file(whole / file)]
    ours, theirs = steps(run), steps(whole)
    if [(r["stage"], r["step"]) for r in ours] != [(r["stage"], r["step"]) for r in theirs]:
        found.append(f"log: {len(ours)} steps, not the {len(theirs)} of the undisturbed run, each once")
    elif ours != theirs:
        first = next(a for a, b in zip(ours, theirs, strict=True) if a != b)
        found.append(f"log: stage {first['stage']}, step {first['step']} has other numbers")
    return found


if __name__ == "__main__":
    sys.exit(main())
