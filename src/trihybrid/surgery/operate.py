"""Applying a plan to a teacher: the student keeps every retained tensor and inherits the rest.

Legend: B batch, T time, D model width, N = B T.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from trihybrid.mixers.contract import Projection, Shared, copy_into
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.span import packed
from trihybrid.mixers.tica import Tica
from trihybrid.models.anatomy import anatomy
from trihybrid.models.checkpoint import save_folder
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.slot import ConvertedSlot
from trihybrid.models.families import family_of
from trihybrid.surgery.calibrate import LayerRecord, record_layers
from trihybrid.surgery.inherit import fold_norm, ridge_regression, rms
from trihybrid.surgery.layout import student_config, student_heads
from trihybrid.surgery.plan import check_plan
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.weights import AttentionWeights, attention_weights

PLAN_FILE = "plan.json"


@torch.no_grad()
def operate(
    teacher: PreTrainedModel, plan: dict[str, Any], tokens: Sequence[tuple[Tensor, Tensor]], seed: int = 0
) -> HybridForCausalLM:
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
    base = teacher.config
    section = check_plan(plan, base)
    if not tokens:
        raise ValueError("no calibration tokens; give at least one block of (input_ids, position_ids)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = family_of(base).student(student_config(base, section))
    # Float32 at least: scales are fitted before anything is rounded to the teacher's dtype.
    student.to(teacher.device, torch.promote_types(teacher.dtype, torch.float32))
    _copy_retained(teacher, student)
    converted = [i for i, slot in enumerate(student.config.slot_list()) if slot.converted]
    owners = {anatomy(base).owners[index] for index in converted}
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
    student: HybridForCausalLM,
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


def _copy_retained(teacher: PreTrainedModel, student: HybridForCausalLM) -> None:
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


def _weights(teacher: PreTrainedModel, index: int) -> AttentionWeights:
    attention = teacher.model.layers[index].self_attn
    return attention_weights(dict(attention.named_parameters()).get, anatomy(teacher.config))


def _inherit_rwkv7(
    mixer: Rwkv7,
    teacher: PreTrainedModel,
    index: int,
    records: dict[int, LayerRecord],
    section: SurgerySection,
) -> None:
    body = anatomy(teacher.config)
    heads, owner = student_heads(teacher.config, section), body.owners[index]
    own, lender = _weights(teacher, index), _weights(teacher, owner)
    x_ND = _rows(records[index].inputs)
    _fill(mixer.receptance, own.query, own.query_bias, own.query_gain, heads.query_rows(), heads.query)
    scale = _scale(own.query, own.query_bias, own.query_gain, x_ND) * body.score_scale
    copy_into(mixer.r_norm.weight, torch.full_like(mixer.r_norm.weight, scale))
    copy_into(mixer.output.weight, own.output[:, heads.query_rows(ordered=False)])
    if own.output_bias is not None:
        copy_into(mixer.output.bias, own.output_bias)
    if mixer.donor is not None:
        return
    key, value, value_bias = lender.key, lender.value, lender.value_bias
    assert key is not None and value is not None
    if owner != index and section.donor_keys_values == "ridge":
        donor_ND = _rows(records[owner].inputs)
        joint = ridge_regression(x_ND, donor_ND @ torch.cat([key, value]).T, section.ridge).to(key.dtype)
        key, value = joint.split(key.shape[0])
    _fill(mixer.key, key, lender.key_bias, lender.key_gain, heads.key_rows(), heads.groups)
    scale = _scale(key, lender.key_bias, lender.key_gain, x_ND)
    copy_into(mixer.k_norm.weight, torch.full_like(mixer.k_norm.weight, scale))
    if body.value_norm:
        # The teacher norms its values (rms 1 a token); the student has no such norm: its projection carries the scale.
        size = max(rms(linear(x_ND, value, value_bias)), 1e-12)
        value, value_bias = value / size, None if value_bias is None else value_bias / size
    _fill(mixer.value, value, value_bias, None, heads.key_rows(ordered=False), heads.groups)


def _rows(blocks: list[Tensor]) -> Tensor:
    """All tokens of blocks [B, T, D], which may differ in length, as rows [N, D]."""
    return torch.cat([block.flatten(0, 1) for block in blocks])


def _fill(
    projection: Projection,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    rows: Tensor,
    heads: int,
) -> None:
    """Copy `rows` of a teacher's projection and of its bias, with the gain of the norm behind it folded in."""
    for parameter, tensor in ((projection.weight, weight), (projection.bias, bias)):
        if tensor is not None:
            folded = tensor if gain is None else fold_norm(tensor, gain, heads)[0]
            copy_into(parameter, folded[rows])


def _scale(weight: Tensor, bias: Tensor | None, gain: Tensor | None, x_ND: Tensor) -> float:
    """Size of what a teacher's projection says to its attention: the rms of its norm's gain, or where it has no norm of
    its outputs on calibration tokens."""
    return rms(linear(x_ND, weight, bias) if gain is None else gain)


def _inherit_tica(mixer: Tica, teacher: PreTrainedModel, index: int, section: SurgerySection) -> None:
    """Queries, keys and values from blocks of the teacher's heads without rotary channels, which match by content as
    TICA does; spread evenly over the teacher's heads."""
    body = anatomy(teacher.config)
    options = mixer.options
    heads = student_heads(teacher.config, section)
    order = torch.arange(heads.width)
    half = heads.width // 2
    content = torch.cat([order[heads.rotary_pairs : half], order[half + heads.rotary_pairs :]])
    if len(content) < options.head_dim:
        raise ValueError(
            f'surgery.tica.start is "inherited": {len(content)} channels a head of the teacher have no rotary '
            f"position, tica.head_dim is {options.head_dim}; lower it, or start fresh"
        )
    own, lender = _weights(teacher, index), _weights(teacher, body.owners[index])
    assert own.query_gain is not None and lender.key_gain is not None
    assert lender.key is not None and lender.value is not None
    query, _ = fold_norm(own.query, own.query_gain, heads.query)
    key, _ = fold_norm(lender.key, lender.key_gain, heads.groups)
    value = lender.value
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
        weight, bias = slot.rwkv7.output.weight, slot.rwkv7.output.bias
        # A bias is the teacher's own and right as it is.
        theirs, ours = (_rows(y) if bias is None else _rows(y) - bias for y in (record.outputs, outputs))
        copy_into(weight, weight * (rms(theirs) / max(rms(ours), 1e-12)))
