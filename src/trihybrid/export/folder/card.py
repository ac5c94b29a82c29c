"""The model card of an exported student: what it is, what it costs, what was measured, and what nobody knows yet.

Every number is computed from the configuration, or read from a run whose lineage names exactly these weights.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from trihybrid import __version__
from trihybrid.models.decoder.config import HybridConfig
from trihybrid.run import Lineage, LineageRecord, RunDirectory, hash_folder
from trihybrid.surgery.card import front, teacher_name, totals
from trihybrid.surgery.cost import account
from trihybrid.surgery.operate import PLAN_FILE
from trihybrid.surgery.plan import CONTEXTS

IMPORTED = "import.json"
"""What an import leaves beside a published student's weights: where they came from."""

LOAD = """## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Needs torch (2.11 or newer) and transformers (5.17 or newer, below 6), nothing else. The code in this folder computes
the recurrence in plain torch; where trihybrid is installed, its kernels are one backend more. `trihybrid import FOLDER
OUT` makes it a student of trihybrid again, without running code from here.
"""

LIMITS = """## Limits

- Text only. An attention mask must be two-dimensional, with padding on one side; packed documents are told apart by
  position ids that start again at 0.
- The recurrence cannot take tokens back: assisted decoding is refused.
- A recurrence forgets: what lies beyond the sliding windows is recalled as well as its state, or the attention beside
  it, holds it. Contexts longer than those trained on are not measured.
- The weights derive from the teacher's; its licence and its own limits hold for them.
"""


def model_card(student: Path, config: HybridConfig, title: str) -> str:
    """The card, Markdown with the hub's front matter.

    Args:
        student: the folder that is exported; its plan, and the run that it lies in, are read where there are any.
        config: its configuration.
        title: what it is called.
    """
    base = config.base()
    slots = config.slot_list()
    contexts = list(CONTEXTS)
    before, after = account(base, None, contexts), account(base, config, contexts)
    plan = _plan(student)
    converted = sum(slot.converted for slot in slots)
    teacher, notes = ("", []) if plan is None else (f", made from {teacher_name(plan)}", plan["warnings"])
    lines = [
        *front(["trihybrid", "custom_code", "hybrid", "rwkv7"]),
        f"# {title}",
        "",
        f"A hybrid language model{teacher}: {converted} of the {len(slots)} layers of a {base.model_type} hold "
        "recurrences or small attentions in the place of the teacher's attention; the others are the teacher's. "
        f"Written by trihybrid {__version__}.{_origin(student)}",
        "",
        LOAD,
        "## Layers",
        "",
        *_layers(after),
        "",
        "## What it costs",
        "",
        "Bytes count weights, keys and values in 2 bytes and recurrent states in 4; FLOPs are those of matrix "
        "products, of one token in a batch of one. All follow from the configuration.",
        "",
        *_totals(before, after),
        "",
        *(f"- {line[0].upper()}{line[1:]}." for line in notes),
        "",
        "## What is known about its quality",
        "",
        *_quality(student),
        "",
        LIMITS,
    ]
    return "\n".join(lines)


def _plan(student: Path) -> dict[str, Any] | None:
    path = student / PLAN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _origin(student: Path) -> str:
    """Where an imported student came from."""
    path = student / IMPORTED
    if not path.is_file():
        return ""
    report = json.loads(path.read_text(encoding="utf-8"))
    return f" Read from {report['source']}, revision {report['revision']}."


def _layers(after: dict[str, Any]) -> list[str]:
    """One row for each stretch of equal layers."""
    rows = ["| layers | mixers | keys and values |", "|---|---|---|"]
    for (mixers, keys_values), stretch in groupby(
        after["layers"], lambda layer: (" + ".join(layer["mixers"]), layer["keys_values"])
    ):
        indices = [layer["index"] for layer in stretch]
        span = f"{indices[0]}" if len(indices) == 1 else f"{indices[0]} to {indices[-1]}"
        rows.append(f"| {span} | {mixers} | {keys_values} |")
    return rows


def _totals(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    rows = totals(before, after)
    for key, label in (
        ("flops_per_token", "FLOPs a token at"),
        ("bytes_read_per_token", "bytes read a token at"),
    ):
        rows += [
            f"| {label} {int(context):,} | {count:,} | {after[key][context]:,} |"
            for context, count in before[key].items()
        ]
    return rows


def _quality(student: Path) -> list[str]:
    """The run's own measurement of these weights, or that there is none."""
    found = _measured(student)
    if found is None:
        return [
            "Nothing was measured by the tool that wrote this card: no finished run names these weights. A conversion "
            "alone is only a start for training."
        ]
    row, records = found
    names = {"bpb": "bits a byte", "kl": "KL to the teacher, nats a token", "agreement": "agreement with it"}
    names |= {"recall": "recall beyond the window"}
    rows = ["| measured on the run's validation text | |", "|---|---|"]
    rows += [f"| {label} | {row[name]:.4f} |" for name, label in names.items() if row.get(name) is not None]
    stages = ", ".join(f"{record.stage} ({record.seconds:.0f} s)" for record in records)
    return [
        *rows,
        "",
        f"From the run that made these weights, by these stages: {stages}. Their hash in its lineage is "
        f"{records[-1].output}.",
    ]


def _measured(student: Path) -> tuple[dict[str, Any], list[LineageRecord]] | None:
    """The row of results and the stages up to it, where the folder lies in a run whose lineage names these weights."""
    run = student.resolve().parent
    folder = RunDirectory(run, create=False)
    if not folder.lineage.is_file() or not folder.results.is_file():
        return None
    records = list(Lineage(folder.lineage).records)
    output = hash_folder(student)
    places = [place for place, record in enumerate(records) if record.output == output]
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    rows = [row for row in results if row.get("stage") == student.resolve().name]
    return (rows[0], records[: places[0] + 1]) if places and rows else None
