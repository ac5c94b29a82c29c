"""The same training on one GPU and on two: equal losses, and how much faster two are.

    python benchmarks/compact_two_gpus.py --corpus FOLDER [--recipe seed-1007] [--steps 60]

Each run trains in a process of its own, the second under torchrun; figures are read from their logs. FOLDER: see
benchmarks/compact.py. The exit code is 1 where two GPUs are less than 1.85 times as fast, or a loss differs by more
than one part in a hundred.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from compact import recipe, tokens

from trihybrid.recipe.train_compact import train_compact
from trihybrid.run import read_log

WARM = 10
"""Steps that do not count: the first ones wait for the data and the allocator."""
RATIO, DIFFERENCE = 1.85, 0.01


def main() -> int:
    """Run both, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--recipe", default="seed-1007")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--train", type=Path, metavar="RUN", help="only train, as one of the workers")
    given = parser.parse_args()
    if given.train:
        train_compact(recipe(given.recipe, changes(given.steps), given.corpus), given.train)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        corpus = tokens(given.corpus, Path(scratch) / "tokens")
        one = train(given.recipe, given.steps, corpus, Path(scratch) / "one", 1)
        two = train(given.recipe, given.steps, corpus, Path(scratch) / "two", 2)
    apart = max(abs(a - b) / a for (a, _), (b, _) in zip(one, two, strict=True))
    rates = [statistics.median(rate for _, rate in run[WARM:]) for run in (one, two)]
    print("| step | loss on one GPU | on two |\n|---|---|---|")
    for step in sorted({0, 1, 2, 5, given.steps // 2, given.steps - 1}):
        print(f"| {step} | {one[step][0]:.5f} | {two[step][0]:.5f} |")
    print(
        f"largest relative difference {apart:.1e}; {rates[0]:,.0f} and {rates[1]:,.0f} tokens/s, "
        f"{rates[1] / rates[0]:.2f} times"
    )
    return 0 if rates[1] >= RATIO * rates[0] and apart <= DIFFERENCE else 1


def changes(steps: int) -> list[str]:
    """Overrides for a run of so many steps, whatever the time."""
    return [
        "train.loop.seconds=null",
        f"train.loop.steps={steps}",
        f"train.loop.checkpoint_every={steps}",
        f"train.schedule.decay_steps={steps // 2}",
    ]


def train(name: str, steps: int, corpus: Path, out: Path, count: int) -> list[tuple[float, float]]:
    """(loss, tokens a second) of every step of a run on so many GPUs."""
    launch = [sys.executable]
    if count > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [
        *launch,
        __file__,
        "--corpus",
        str(corpus),
        "--recipe",
        name,
        "--steps",
        str(steps),
        "--train",
        str(out),
    ]
    devices = ",".join(map(str, range(count)))
    subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": devices})
    rows = [row for row in read_log(out / "log.jsonl") if row["kind"] == "train"]
    return [(row["loss"], row["tokens_per_second"]) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
