"""Which optimizer the new matrices want: stages 1 and 2 of the demo, each with AdamW and Muon at several rates.

    python benchmarks/distill_optimizers.py --teacher runs/demo/teacher --out FOLDER [--rows NAME...] [--json FOLDER]

The teacher is the demo's, from `trihybrid demo`. A row is that recipe with another optimizer in a stage or in both; a
stage that is not named has AdamW at 4e-3 or 3e-3. Vectors, decays and low-rank factors have AdamW in every row, at the
rate of the matrices where none of its own is named. Printed: the mean alignment loss of stage 1's last ten steps, and
behind each stage bits per byte, KL and recall beyond the window. About a minute a row on two cores. A command that was
killed goes on when it is given again. --json writes the rows as distill_optimizers.json into FOLDER.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trihybrid.recipe.execute import execute
from trihybrid.recipe.load import load_conversion
from trihybrid.run import read_log, write_json

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
LAST = 10


@dataclass(frozen=True)
class Choice:
    """An optimizer: AdamW at a rate, or for matrices Muon at `muon`, which is the rate of all where `rate` is None."""

    rate: float | None = None
    muon: float | None = None

    def section(self) -> dict[str, Any]:
        """As a recipe has it."""
        base = {"learning_rate": self.rate or self.muon, "weight_decay": 0.01}
        if self.muon is None:
            return {"name": "adamw", **base}
        return {"name": "muon", **base, "muon": {"learning_rate": self.muon}}

    def __str__(self) -> str:
        adamw = "" if self.rate is None else f"adamw-{self.rate}"
        return "-".join(filter(None, [adamw, "" if self.muon is None else f"muon-{self.muon}"]))


FIRST = (Choice(4e-3), Choice(3e-3))
"""Of stage 1 and stage 2 where a row names none."""
STAGE_1 = [Choice(r) for r in (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)]
STAGE_1 += [Choice(muon=r) for r in (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)] + [Choice(4e-3, 2e-2), Choice(4e-3, 4e-2)]
STAGE_2 = [Choice(r) for r in (1.5e-3, 6e-3, 1.2e-2)]
STAGE_2 += [Choice(muon=r) for r in (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)] + [Choice(3e-3, 2e-2)]
BOTH = [
    (Choice(muon=first), Choice(muon=second))
    for first, second in ((1e-2, 1e-2), (2e-2, 1e-2), (2e-2, 2e-2), (4e-2, 1e-2), (4e-2, 2e-2))
]
BOTH.append((Choice(4e-3, 4e-2), Choice(3e-3, 2e-2)))

ROWS: dict[str, tuple[Choice, Choice]] = {
    **{f"stage-1-{choice}": (choice, FIRST[1]) for choice in STAGE_1},
    **{f"stage-2-{choice}": (FIRST[0], choice) for choice in STAGE_2},
    **{f"both-{first}-{second}": (first, second) for first, second in BOTH},
}


def main() -> int:
    """Train the rows and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the run directories")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", type=Path, metavar="FOLDER")
    given = parser.parse_args()
    rows = []
    for name in given.rows:
        rows.append(make_row(name, given.teacher, given.out / name, given.overrides))
        if given.json is not None:
            given.json.mkdir(parents=True, exist_ok=True)
            write_json(given.json / "distill_optimizers.json", rows)
    print("| row | alignment loss | aligned: bpb | KL | recall | matched: bpb | KL | recall |")
    print(f"|{'---|' * 8}")
    for row in rows:
        sides = [f"{side['bpb']:.4f} | {side['kl']:.4f} | {side['recall']:.3f}" for side in row["measured"]]
        print(f"| {row['row']} | {row['alignment_loss']:.4f} | {' | '.join(sides)} |")
    return 0


def make_row(name: str, teacher: Path, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Convert and distil with the row's optimizers."""
    changes = [f"teacher={json.dumps({'folder': str(teacher)})}", "targets={}"]
    for stage, choice in enumerate(ROWS[name]):
        changes.append(f"stages.{stage}.optimizer={json.dumps(choice.section())}")
    measured = execute(load_conversion(str(RECIPE), [*changes, *overrides]), out, resume=True)
    assert measured is not None
    losses = [
        r["loss"] for r in read_log(out / "log.jsonl") if r["kind"] == "train" and r["stage"] == "aligned"
    ]
    return {
        "benchmark": "distill_optimizers",
        "row": name,
        "optimizers": [choice.section() for choice in ROWS[name]],
        "alignment_loss": statistics.mean(losses[-LAST:]),
        "measured": measured[-2:],
    }


if __name__ == "__main__":
    sys.exit(main())
