"""What a conversion keeps: a teacher trained here, and one row for each way to convert and distil it.

    python benchmarks/distill_quality.py teacher --out FOLDER [--set data.source=TEXT] [--tiny]
    python benchmarks/distill_quality.py row NAME... --out FOLDER [--set data.source=TEXT] [--tiny] [--rows FOLDER]
    python benchmarks/distill_quality.py list

`teacher` trains the teacher of recipes/quality.yaml and, for the row all-full, one whose layers are all global. Each
row then is a command of its own: the recipe with the changes of the table ROWS, on the same teacher, text and tokens. A
row holds the teacher's hash, tokens spent, bytes of cache, and of the teacher and the student after every step: bits a
byte, KL, agreement, entropy, calibration error, recall by distance, needle retrieval by length. `python
benchmarks/results.py` puts the rows into docs/results.md. A command that was killed goes on when it is given again.
--tiny makes all of it small enough for a test; its figures say nothing.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trihybrid.recipe.execute import execute
from trihybrid.recipe.load import load_conversion
from trihybrid.report.cache_bytes import cache_bytes
from trihybrid.run import hash_folder, read_log, write_json

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "quality.yaml"
MUON = tuple(
    f"stages.{stage}.optimizer={{name: muon, learning_rate: {rate}, muon: {{learning_rate: {muon}}}}}"
    for stage, rate, muon in ((0, 3.0e-3, 4.0e-2), (1, 2.0e-3, 2.0e-2))
)
"""Muon for the matrices; the rest as it was."""
NEW = ["model.layers.*.self_attn.rwkv7.*", "model.layers.*.self_attn.tica.*"]
CONTEXT = 8192
TINY = [
    "data.recall={fraction: 0.3, pairs: 4, rounds: 6, evaluation_documents: 4}",
    "teacher.pretrain.shape.hidden_size=16",
    "teacher.pretrain.shape.intermediate_size=32",
    "teacher.pretrain.shape.head_dim=8",
    "teacher.pretrain.shape.global_head_dim=16",
    "teacher.pretrain.shape.sliding_window=16",
    "teacher.pretrain.shape.hidden_size_per_layer_input=4",
    "teacher.pretrain.loop={steps: 2, batch_size: 2, sequence_length: 32}",
    "teacher.pretrain.schedule={kind: constant}",
    "surgery.rwkv7={head_dim: 8, decay_rank: 4, iclr_rank: 4, gate_rank: 4}",
    "surgery.tica={heads: 2, kv_heads: 1, head_dim: 8, gate_rank: 4}",
    "surgery.calibration_tokens=256",
    "evaluation={sequence_length: 64, batch_size: 4, validation_tokens: 400,"
    " needle: {lengths: [32, 64], documents: 2}}",
    "samples={prompts: ['The '], tokens: 4}",
]
TINY_STAGE = ["loop={steps: 2, batch_size: 2, sequence_length: 32}", "schedule={kind: constant}"]


@dataclass(frozen=True)
class Ablation:
    """A row: what it asks, its changes of the recipe, the stages that it has (their places), and its teacher."""

    question: str
    changes: tuple[str, ...] = ()
    stages: tuple[int, ...] = (0, 1)
    teacher: str = "teacher"


ROWS = {
    "both": Ablation("RWKV-7 + TICA, stage 1 and stage 2: what the others are compared with"),
    "rwkv7": Ablation("RWKV-7 alone", ("surgery.legend={S: sliding, F: full, R: rwkv7}",)),
    "tica": Ablation("TICA alone", ("surgery.legend={S: sliding, F: full, R: tica}",)),
    "shared": Ablation(
        "TICA with keys and values shared as the teacher shares them", ("surgery.share_kv=teacher",)
    ),
    "inherited": Ablation(
        "TICA starts from the teacher's channels without a position", ("surgery.tica.start=inherited",)
    ),
    "shared-inherited": Ablation(
        "the same, with keys and values shared as the teacher shares them",
        ("surgery.share_kv=teacher", "surgery.tica.start=inherited"),
    ),
    "muon": Ablation("Muon for the new matrices, in both stages", MUON),
    "shared-inherited-muon": Ablation(
        "TICA shared and from the teacher's channels, Muon",
        ("surgery.share_kv=teacher", "surgery.tica.start=inherited", *MUON),
    ),
    "two-global": Ablation("two global layers kept", ("surgery.pattern=SSR SSR SSF SSF",)),
    "stage-1": Ablation("stage 1 only", stages=(0,)),
    "stage-2": Ablation("stage 2 only", stages=(1,)),
    "copy": Ablation("keys and values of donors copied, not fitted", ("surgery.donor_keys_values=copy",)),
    "plain-heads": Ablation("blocks of heads in plain order", ("surgery.heads=plain",)),
    "published-gate": Ablation("gate at the start as published", ("surgery.rwkv7.gate=published",)),
    "train-sliding": Ablation(
        "sliding attention trained too, in stage 2",
        (f"stages.1.train={json.dumps([*NEW, 'model.layers.*.self_attn.*_proj.weight'])}",),
    ),
    "all-full": Ablation("a teacher whose layers are all global, made linear", teacher="teacher-full"),
}


def main() -> int:
    """Train the teachers, make a row, or list the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["teacher", "row", "list"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows, or teachers; all if none is given")
    parser.add_argument("--out", type=Path, help="folder of the run directories")
    parser.add_argument("--rows", type=Path, default=ROOT / "benchmarks" / "rows" / "quality")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    known = ["teacher", "teacher-full"] if given.command == "teacher" else list(ROWS)
    if given.command == "list":
        print("\n".join(f"{name:15} {row.question}" for name, row in ROWS.items()))
        return 0
    if given.out is None or set(given.names) - set(known):
        parser.error(f"give --out, and names out of {', '.join(known)}")
    common = [*(TINY if given.tiny else []), *given.overrides]
    for name in given.names or known:
        if given.command == "teacher":
            train_teacher(name, given.out, common)
        else:
            given.rows.mkdir(parents=True, exist_ok=True)
            write_json(given.rows / f"{name}.json", make_row(name, given.out, common, given.tiny))
            print(f"{given.rows / name}.json")
    return 0


def full(name: str) -> list[str]:
    """The change of the shape that makes the second teacher."""
    types = json.dumps(["full_attention"] * 12)
    return [f"teacher.pretrain.shape.layer_types={types}"] if name == "teacher-full" else []


def train_teacher(name: str, out: Path, common: list[str]) -> None:
    """Train a teacher, whose run ends with its conversion and no stage."""
    execute(load_conversion(str(RECIPE), [*common, *full(name), "stages=[]"]), out / name, resume=True)
    print(f"{out / name / 'teacher'}: {hash_folder(out / name / 'teacher')}")


def make_row(name: str, out: Path, common: list[str], tiny: bool) -> dict[str, Any]:
    """Convert and distil as the row says; the row."""
    row = ROWS[name]
    folder = out / row.teacher / "teacher"
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: python benchmarks/distill_quality.py teacher --out {out}")
    small = [f"stages.{stage}.{change}" for stage in (0, 1) for change in TINY_STAGE] if tiny else []
    kept = [change for change in common if not change.startswith("teacher.")]
    changes = [*kept, *small, *row.changes]
    recipe = load_conversion(str(RECIPE), changes)
    recipe = recipe.model_copy(update={"stages": [recipe.stages[stage] for stage in row.stages]})
    teacher = recipe.teacher.model_copy(update={"pretrain": None, "folder": str(folder)})
    recipe = recipe.model_copy(update={"teacher": teacher})
    run = out / f"row-{name}"
    measured = execute(recipe, run, resume=True)
    assert measured is not None
    plan = json.loads((run / "plan.json").read_text())
    steps = [r for r in read_log(run / "log.jsonl") if r["kind"] == "train" and r["step"] + 1 == r["steps"]]
    sides = {side: cache_bytes(plan[side]) for side in ("before", "after")}
    return {
        "row": name,
        "question": row.question,
        "changes": list(row.changes),
        "tiny": tiny,
        "teacher": hash_folder(folder),
        "teacher_parameters": plan["before"]["parameters"],
        "parameters": plan["after"]["parameters"],
        "tokens": {step["stage"]: step["tokens"] for step in steps},
        "seconds": {step["stage"]: step["seconds"] for step in steps},
        "context": CONTEXT,
        "cache_bytes": {side: None if held is None else held.at(CONTEXT) for side, held in sides.items()},
        "measured": measured,
    }


if __name__ == "__main__":
    sys.exit(main())
