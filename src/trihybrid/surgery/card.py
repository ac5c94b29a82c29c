"""The model card of a converted student: what it is, what it was made from, what it costs, what it cannot do yet.

Its parts serve the card of an exported student too.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trihybrid import __version__
from trihybrid.surgery.render import TOTALS
from trihybrid.surgery.tensors import TOWERS, TensorReport

CARD = "README.md"


def front(tags: Iterable[str], base_model: str | None = None) -> list[str]:
    """The hub's front matter, which begins a card."""
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([] if base_model is None else [f"base_model: {base_model}"]),
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
    ]


def teacher_name(plan: dict[str, Any]) -> str:
    """The hub's name, or a shape's, or the last part of a path: where a folder lay says nothing to others."""
    name = plan["teacher"]
    return name if re.fullmatch(r"[\w-]+(/[\w.-]+)?", name) else Path(name).name


def totals(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The table of what a teacher costs and what its student does, from two accounts (see `cost.account`)."""
    rows = (f"| {label} | {before[key]:,} | {after[key]:,} |" for key, label in TOTALS)
    return ["| | teacher | student |", "|---|---|---|", *rows]


def student_card(plan: dict[str, Any], report: TensorReport, name: str) -> str:
    """Markdown with the hub's front matter, from a plan (see `make_plan`) and what became of the tensors.

    Args:
        name: of the student.
    """
    slots = [layer for layer in plan["layers"] if layer["sources"]]
    kinds = sorted({kind for layer in slots for kind in layer["after"]})
    converted = ", ".join(str(layer["index"]) for layer in slots)
    teacher = teacher_name(plan)
    lines = [
        *front(["trihybrid", *kinds], teacher if "/" in teacher else None),
        f"# {name}",
        "",
        f"A hybrid made from {teacher} by trihybrid {__version__}. Layers {converted or 'none'} of "
        f"{len(plan['layers'])} mix over time by {' and '.join(kinds) or 'the same attention'} now; all others are the "
        "teacher's, byte for byte.",
        "",
        "**It is only a start: it was converted and not trained.** Its new mixers inherit what they can from the "
        "teacher's attention, which they do not equal. Distil it before use (`trihybrid distill`).",
        "",
        *totals(plan["before"], plan["after"]),
        "",
        *(f"- {line}" for line in plan["warnings"]),
        "",
        "## Layers",
        "",
        "| layer | was | is | made from |",
        "|---|---|---|---|",
        *(
            f"| {layer['index']} | {layer['before']} | {' + '.join(layer['after'])} | "
            f"{'; '.join(f'{tensor}: {source}' for tensor, source in layer['sources'].items())} |"
            for layer in slots
        ),
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "from trihybrid.models.families import register",
        "",
        "register()",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
        "```",
        "",
        *_media(report),
        "`plan.json` has every decision, `trihybrid.json` what became of every tensor and the digest of every file. "
        "The teacher's licence and terms hold for what was made from it.",
    ]
    return "\n".join(lines) + "\n"


def _media(report: TensorReport) -> list[str]:
    if not report.carried and not report.left_out:
        return []
    towers = (
        f"The teacher's {len(report.carried)} tensors for images and sound lie untouched in `{TOWERS}/`, for a later "
        "multimodal class; this model does not read them."
        if report.carried
        else "The teacher's tensors for images and sound were left out."
    )
    return [f"Text only: a prompt with a token for an image, sound or video is refused. {towers}", ""]
