"""Applying a plan to a teacher in memory: the student keeps every retained tensor and inherits the rest.

Its slots are those of `build_slots`, so it is to the bit the student that `stream_student` writes.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.inventory import converted_prefixes, empty_student
from trihybrid.models.teacher.source import ModelSource, TensorSource
from trihybrid.storage.folder import save_folder
from trihybrid.surgery.layout import student_config
from trihybrid.surgery.plan import check_plan
from trihybrid.surgery.slots import Block, build_slots

PLAN_FILE = "plan.json"


@torch.no_grad()
def operate(
    teacher: PreTrainedModel, plan: dict[str, Any], tokens: Sequence[Block] = (), seed: int = 0
) -> HybridForCausalLM:
    """The student that `plan` makes of `teacher`.

    Args:
        teacher: the model that the plan was made for; it is not changed.
        plan: see `make_plan`.
        tokens: calibration blocks (input_ids, position_ids), both int64 [B, T], that scales are fitted on; none where
            the plan's `calibration_tokens` is 0.
        seed: of the tensors that start random (LoRAs, fresh TICA projections).

    Returns:
        The student in the teacher's dtype, in eval mode.

    Raises:
        ValueError: the plan of another teacher; see `build_slots`.
    """
    base = teacher.config
    section = check_plan(plan, base)
    source = ModelSource(teacher)
    student = empty_student(student_config(base, section))
    for built in build_slots(source, base, section, tokens, seed):
        for parameter in built.slot.parameters():
            parameter.data = parameter.data.to(teacher.dtype)
        student.model.layers[built.index].self_attn = built.slot
    _copy_retained(source, student)
    student.generation_config = teacher.generation_config
    return student.eval()


def save_student(
    student: HybridForCausalLM,
    plan: dict[str, Any],
    folder: str | Path,
    save_tokenizer: Callable[[Path], None] | None = None,
) -> None:
    """Write the student with its plan (and tokenizer, if given a function that saves it), whole or not at all."""

    def write(partial: Path) -> None:
        student.save_pretrained(partial)
        write_plan(partial, plan)
        if save_tokenizer is not None:
            save_tokenizer(partial)

    save_folder(folder, write)


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Put the plan into a student's folder."""
    (folder / PLAN_FILE).write_text(json.dumps(plan, indent=2) + "\n")


def read_plan(folder: str | Path) -> dict[str, Any]:
    """The plan that a student was made by.

    Raises:
        ValueError: the folder holds no plan, or one that is not JSON.
    """
    path = Path(folder) / PLAN_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; the folder is not a converted student") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _copy_retained(source: TensorSource, student: HybridForCausalLM) -> None:
    """Copy every tensor that both have, buffers (layer scalars) included; what is left must be a mixer of ours."""
    given, ours = set(source.names), converted_prefixes(student.config)
    for path, module in student.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{path}.{name}".removeprefix(".")
            if tensor is None or full.startswith(ours):
                continue
            if full not in given and module is student.lm_head:
                continue
            assert full in given, f"{full} is not the teacher's"
            copied = source.read(full).clone()
            assert copied.shape == tensor.shape, f"{full} is not the teacher's"
            setattr(module, name, nn.Parameter(copied) if isinstance(tensor, nn.Parameter) else copied)
    student.tie_weights()
