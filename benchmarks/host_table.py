"""What tables on the host cost each of several processes in memory.

    python benchmarks/host_table.py [--words 65536] [--processes 2] [--json FOLDER]

Writes a random Gemma-4-shaped teacher and its student in bfloat16 to a temporary folder, with a table of per-layer
inputs of 6,144 numbers a word. Each process, all at once, loads both as a stage does, leaves the table on the host and
looks up every word. Anonymous memory is a process's own; of pages of files that several processes map, each counts its
share: here of the teacher's file too, which is compared with the student's. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distill_e2b_models import build, tiny

from trihybrid.distill.host_table import host_tables, leave_tables
from trihybrid.distill.pair import Pair
from trihybrid.distill.section import NEW_MIXERS
from trihybrid.models.checkpoint import load_student, load_teacher

MIB = 2**20
WIDTH = 1024
TOKENS = 4096


def main() -> None:
    """Write the models, start the processes, print the table."""
    parser = argparse.ArgumentParser(description="The cost of a table on the host.")
    parser.add_argument("--words", type=int, default=65536, help="rows of the table")
    parser.add_argument("--processes", type=int, default=2, help="that load the models at once")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write the rows as host_table.json there")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write is not None:
        write(given.write, given.words)
        return
    if given.work is not None:
        work(given.work)
        return
    command = [sys.executable, __file__]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as folder:
        # Not here: this process's memory would be in the way.
        subprocess.run([*command, "--write", folder, "--words", str(given.words)], check=True)
        workers = [subprocess.Popen([*command, "--work", folder], **pipes) for _ in range(given.processes)]
        rows = [told(worker) for worker in workers]
        for worker, row in zip(workers, rows, strict=True):
            row |= told(worker)
        for worker in workers:
            worker.communicate("\n")
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(f'{value:,.1f}' for value in row.values())} |")
    if given.json is not None:
        given.json.mkdir(parents=True, exist_ok=True)
        (given.json / "host_table.json").write_text(json.dumps(rows, indent=2) + "\n")


def write(folder: Path, words: int) -> None:
    """A teacher and its student."""
    setting = tiny()
    setting.base.vocab_size = setting.base.vocab_size_per_layer_input = words
    setting.base.hidden_size_per_layer_input = WIDTH
    teacher, student = build(replace(setting, dtype=torch.bfloat16))
    teacher.save_pretrained(folder / "teacher")
    student.save_pretrained(folder / "student")


def told(worker: subprocess.Popen) -> dict[str, float]:
    """Let a worker go on, and read what it says."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def work(folder: Path) -> None:
    """What one process does, a part for each line that it reads."""

    def say(**figures: float) -> None:
        print(json.dumps(figures), flush=True)

    input()
    before = memory()
    student = load_student(folder / "student")
    pair = Pair(student, load_teacher(folder / "teacher"), NEW_MIXERS)
    leave_tables(student, torch.device("cpu"))
    (table,) = host_tables(pair.student.model).values()
    words = len(table.weight)
    for first in range(0, words, TOKENS):
        table.look_up(torch.arange(first, min(first + TOKENS, words))[None])
    say(**{"table MiB": table.weight.nbytes / MIB})
    input()
    after = memory()
    say(**{f"{kind} MiB more": after[kind] - before[kind] for kind in before})
    # The others have not measured yet.
    input()


def memory() -> dict[str, float]:
    """MiB of this process: its own, and its share of pages of files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"anonymous": sizes["Anonymous"], "share of files": sizes["Pss_File"]}


if __name__ == "__main__":
    main()
