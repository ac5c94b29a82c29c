"""Applying a plan to a teacher: the student keeps every retained tensor and inherits the rest.

Legend: B batch, T time, D model width, K key channels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.span import packed
from trihybrid.mixers.tica import Tica
from trihybrid.models.checkpoint import save_folder
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.models.gemma4.config import key_value_owner
from trihybrid.models.gemma4.slot import ConvertedSlot
from trihybrid.surgery.calibrate import LayerRecord, record_layers
from trihybrid.surgery.inherit import Heads, fold_norm, ridge_regression, rms
from trihybrid.surgery.layout import rotary_pairs, student_config
from trihybrid.surgery.plan import check_plan
from trihybrid.surgery.section import SurgerySection

PLAN_FILE = "plan.json"


@torch.no_grad()
def operate(
    teacher: Gemma4ForCausalLM, plan: dict[str, Any], tokens: Sequence[tuple[Tensor, Tensor]], seed: int = 0
) -> TrihybridGemma4ForCausalLM:
    """The student that `plan` makes of `teacher`.

    Args:
        teacher: the model that the plan was made for; it is not changed.
        plan: see `make_plan`.
        tokens: calibration blocks (input_ids, position_ids), both int64 [B, T]; scales are fitted on them.
        seed: of the tensors that start random (LoRAs, fresh TICA projections).

    Returns:
        The student in the teacher's dtype, in eval mode.

    Raises:
        ValueError: the plan of another teacher, or no calibration tokens.
    """
    base: Gemma4TextConfig = teacher.config
    section = check_plan(plan, base)
    if not tokens:
        raise ValueError("no calibration tokens; give at least one block of (input_ids, position_ids)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = TrihybridGemma4ForCausalLM(student_config(base, section))
    # Float32 at least: scales are fitted before anything is rounded to the teacher's dtype.
    student.to(teacher.device, torch.promote_types(teacher.dtype, torch.float32))
    _copy_retained(teacher, student)
    converted = [i for i, slot in enumerate(student.config.slot_list()) if slot.converted]
    owners = {key_value_owner(base, index) for index in converted}
    records = record_layers(teacher, tokens, sorted(owners | set(converted)))
    shared = [Shared() for _ in tokens]
    for index in converted:
        slot = student.model.layers[index].self_attn
        for mixer in slot.mixers():
            if isinstance(mixer, Rwkv7):
                _inherit_rwkv7(mixer, teacher, index, records, section)
            elif isinstance(mixer, Tica) and section.tica.start == "inherited":
                _inherit_tica(mixer, teacher, index, section)
        _calibrate(slot, records[index], tokens, shared)
    for parameter in student.parameters():
        # Not `student.to`: that would round the rotary frequencies too.
        parameter.data = parameter.data.to(teacher.dtype)
    student.generation_config = teacher.generation_config
    return student.eval()


def save_student(
    student: TrihybridGemma4ForCausalLM,
    plan: dict[str, Any],
    folder: str | Path,
    save_tokenizer: Callable[[Path], None] | None = None,
) -> None:
    """Write the student with its plan (and tokenizer, if given a function that saves it), whole or not at all."""

    def write(partial: Path) -> None:
        student.save_pretrained(partial)
        (partial / PLAN_FILE).write_text(json.dumps(plan, indent=2) + "\n")
        if save_tokenizer is not None:
            save_tokenizer(partial)

    save_folder(folder, write)


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
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _copy_retained(teacher: Gemma4ForCausalLM, student: TrihybridGemma4ForCausalLM) -> None:
    """Copy every tensor that both have, buffers (layer scalars) included; what is left must be a mixer of ours."""
    given = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    taken = dict(student.named_parameters()) | dict(student.named_buffers())
    converted = [
        f"model.layers.{i}.self_attn." for i, slot in enumerate(student.config.slot_list()) if slot.converted
    ]
    for name, tensor in taken.items():
        if name.startswith(tuple(converted)):
            continue
        assert name in given and given[name].shape == tensor.shape, f"{name} is not the teacher's"
        # Not `copy_into`, which would keep the student's dtype.
        tensor.data = given[name].detach().clone()


def _teacher_heads(base: Gemma4TextConfig, section: SurgerySection) -> Heads:
    wide = base.per_layer_config["full_attention"]
    return Heads(
        query=base.num_attention_heads,
        groups=wide.num_key_value_heads,
        width=wide.head_dim,
        narrow=section.rwkv7.head_dim,
        rotary_pairs=rotary_pairs(base),
        permuted=section.heads == "permuted",
    )


def _inherit_rwkv7(
    mixer: Rwkv7,
    teacher: Gemma4ForCausalLM,
    index: int,
    records: dict[int, LayerRecord],
    section: SurgerySection,
) -> None:
    base: Gemma4TextConfig = teacher.config
    heads = _teacher_heads(base, section)
    own = teacher.model.layers[index].self_attn
    query, scale = fold_norm(own.q_proj.weight, own.q_norm.weight, heads.query)
    copy_into(mixer.receptance.weight, query[heads.query_rows()])
    copy_into(mixer.r_norm.weight, torch.full_like(mixer.r_norm.weight, scale))
    copy_into(mixer.output.weight, own.o_proj.weight[:, heads.query_rows(ordered=False)])
    if mixer.donor is not None:
        return
    owner = key_value_owner(base, index)
    lender = teacher.model.layers[owner].self_attn
    key = lender.k_proj.weight
    value = key if lender.v_proj is None else lender.v_proj.weight
    if owner != index and section.donor_keys_values == "ridge":
        x_TD, donor_TD = (torch.cat(records[i].inputs).flatten(0, 1) for i in (index, owner))
        joint = ridge_regression(x_TD, donor_TD @ torch.cat([key, value]).T, section.ridge).to(key.dtype)
        key, value = joint.split(key.shape[0])
    key, scale = fold_norm(key, lender.k_norm.weight, heads.groups)
    copy_into(mixer.key.weight, key[heads.key_rows()])
    copy_into(mixer.k_norm.weight, torch.full_like(mixer.k_norm.weight, scale))
    # The teacher norms its values (rms 1 a token); the student has no such norm, so its projection carries the scale.
    value = value / max(rms(torch.cat(records[index].inputs) @ value.T), 1e-12)
    copy_into(mixer.value.weight, value[heads.key_rows(ordered=False)])


def _inherit_tica(mixer: Tica, teacher: Gemma4ForCausalLM, index: int, section: SurgerySection) -> None:
    """Queries, keys and values from blocks of the teacher's heads without rotary channels, which match by content as
    TICA does; spread evenly over the teacher's heads."""
    base: Gemma4TextConfig = teacher.config
    options = mixer.options
    heads = _teacher_heads(base, section)
    order = torch.arange(heads.width)
    half = heads.width // 2
    content = torch.cat([order[heads.rotary_pairs : half], order[half + heads.rotary_pairs :]])
    if len(content) < options.head_dim:
        raise ValueError(
            f'surgery.tica.start is "inherited": {len(content)} channels a head of the teacher have no rotary '
            f"position, tica.head_dim is {options.head_dim}; lower it, or start fresh"
        )
    lender = teacher.model.layers[key_value_owner(base, index)].self_attn
    own = teacher.model.layers[index].self_attn
    query, _ = fold_norm(own.q_proj.weight, own.q_norm.weight, heads.query)
    key, _ = fold_norm(lender.k_proj.weight, lender.k_norm.weight, heads.groups)
    value = lender.k_proj.weight if lender.v_proj is None else lender.v_proj.weight
    places = len(content) // options.head_dim
    per_key = options.heads // options.kv_heads

    def rows(head: int, place: int) -> Tensor:
        return head * heads.width + content[place * options.head_dim : (place + 1) * options.head_dim]

    for group in range(options.kv_heads):
        lent, place = group % heads.groups, (group // heads.groups) % places
        target = slice(group * options.head_dim, (group + 1) * options.head_dim)
        if mixer.donor is None:
            copy_into(mixer.k_proj.weight[target], key[rows(lent, place)])
            copy_into(mixer.v_proj.weight[target], value[rows(lent, place)])
        for member in range(per_key):
            head = lent * (heads.query // heads.groups) + (group * per_key + member) % (
                heads.query // heads.groups
            )
            first = (group * per_key + member) * options.head_dim
            copy_into(mixer.q_proj.weight[first : first + options.head_dim], query[rows(head, place)])


def _calibrate(
    slot: ConvertedSlot, record: LayerRecord, tokens: Sequence[tuple[Tensor, Tensor]], shared: list[Shared]
) -> None:
    """Scale the output projection so that the slot's output has the rms of the teacher's attention on the same inputs
    (TICA starts at zero and adds nothing). Also fills `shared` for slots above that read this one's keys and values."""
    outputs = [
        slot.mix(x_BTD, packed(positions.expand(x_BTD.shape[:2])), record_shared, None)
        for x_BTD, (_, positions), record_shared in zip(record.inputs, tokens, shared, strict=True)
    ]
    if hasattr(slot, "rwkv7"):
        weight = slot.rwkv7.output.weight
        copy_into(weight, weight * (rms(torch.cat(record.outputs)) / max(rms(torch.cat(outputs)), 1e-12)))
