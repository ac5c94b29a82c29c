"""Converting one folder into another: the surgery alone, without distillation."""

import json
from pathlib import Path
from typing import Any

import torch

from trihybrid.data import Tokenizer, read_documents
from trihybrid.models.checkpoint import load_teacher
from trihybrid.surgery.operate import operate, save_student
from trihybrid.surgery.plan import check_plan, make_plan
from trihybrid.surgery.section import SurgerySection

ROW = 256


def convert_folder(
    teacher: Path, out: Path, section: SurgerySection | None, plan_file: Path | None, text: str
) -> dict[str, Any]:
    """Write the student of the teacher in `teacher` to `out`, by a section or by a saved plan; returns the plan.

    Raises:
        ValueError: `out` exists; a teacher, plan or text that does not serve. Nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a folder that does not exist yet")
    plan = None if plan_file is None else _read_json(plan_file)
    model = load_teacher(teacher)
    if plan is None:
        assert section is not None
        plan = make_plan(model.config, section, str(teacher))
    section = check_plan(plan, model.config)
    tokenizer = Tokenizer.from_file(teacher)
    rows = calibration_rows(read_documents(text), tokenizer, section.calibration_tokens)
    student = operate(model, plan, [(row[None], torch.arange(len(row))[None]) for row in rows])
    save_student(student, plan, out, tokenizer.save)
    return plan


def calibration_rows(documents: list[str], tokenizer: Tokenizer, tokens: int) -> list[torch.Tensor]:
    """The beginnings of documents, each with a BOS and at most `ROW` tokens, until there are `tokens` of them."""
    rows: list[torch.Tensor] = []
    for document in documents:
        rows.append(torch.tensor([tokenizer.bos_id, *tokenizer.encode(document)[: ROW - 1]]))
        if sum(map(len, rows)) >= tokens:
            break
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such plan file; make one with `trihybrid plan --save`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
