"""The plan: what a surgery will do, before it is done, as one JSON object that is saved with the student."""

import hashlib
import json
from typing import Any

from pydantic import ValidationError

from trihybrid.models.anatomy import Anatomy, anatomy
from trihybrid.models.pattern import Slot
from trihybrid.models.shapes import TeacherConfig
from trihybrid.surgery.cost import account
from trihybrid.surgery.layout import blueprint, settle, student_heads
from trihybrid.surgery.notes import warnings
from trihybrid.surgery.section import SurgerySection

FORMAT = 1
CONTEXTS = (4096, 32768, 131072)
OF_SOME = (
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "query_pre_attn_scalar",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)


def make_plan(
    base: TeacherConfig, section: SurgerySection, name: str, contexts: tuple[int, ...] = CONTEXTS
) -> dict:
    """The plan of a surgery; needs no weights.

    Args:
        base: the teacher's text configuration.
        section: what shall stand in each slot and what its tensors are made from.
        name: what the teacher is called.
        contexts: lengths at which FLOPs a token are computed.

    Returns:
        A JSON object: format, teacher, teacher_hash, surgery, before and after (see `account`), layers (converted ones
        with the source of every tensor), warnings.

    Raises:
        ValueError: a layout that does not fit the teacher.
    """
    section = settle(base, section)
    student = blueprint(base, section)
    slots, body = student.slots, anatomy(base)
    before = account(base, None, list(contexts))
    after = account(base, student, list(contexts))
    layers = [
        {
            "index": index,
            "before": body.kinds[index],
            "after": list(slot.mixers),
            "parameters_before": before["layers"][index]["mixer_parameters"],
            "parameters_after": after["layers"][index]["mixer_parameters"],
            "keys_values": after["layers"][index]["keys_values"],
            "sources": sources(base, slot, index, section) if slot.converted else {},
        }
        for index, slot in enumerate(slots)
    ]
    return {
        "format": FORMAT,
        "teacher": name,
        "teacher_hash": config_hash(base),
        "surgery": section.model_dump(),
        "before": before,
        "after": after,
        "layers": layers,
        "warnings": warnings(base, section, slots, before, after),
    }


def config_hash(base: TeacherConfig) -> str:
    """sha256 of what decides a teacher's tensors and their meaning; two checkpoints of one shape have the same."""
    fields = base.to_dict()
    named = {
        name: fields.get(name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "per_layer_config",
            "layer_types",
            "sliding_window",
            "rope_parameters",
            "num_kv_shared_layers",
            "use_double_wide_mlp",
            "hidden_size_per_layer_input",
            "hidden_activation",
            "rms_norm_eps",
            "attention_k_eq_v",
            "enable_moe_block",
            "final_logit_softcapping",
        )
    }
    # What only some teachers have, and only there: the others keep the hash that they had without it.
    for name in OF_SOME:
        if fields.get(name):
            named[name] = fields[name]
    if not fields.get("model_type", "").startswith("gemma"):
        named["model_type"] = fields["model_type"]
        named["tie_word_embeddings"] = fields["tie_word_embeddings"]
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()


def check_plan(plan: dict[str, Any], base: TeacherConfig) -> SurgerySection:
    """The surgery section of a plan that was made for this teacher. The plan is made again from it, so that what a plan
    from elsewhere says is what will be done.

    Raises:
        ValueError: not a plan, another format, the plan of another teacher, a surgery section that cannot be, or a
            field that does not follow from it.
    """
    if not isinstance(plan, dict) or not {"format", "teacher", "teacher_hash", "surgery"} <= set(plan):
        raise ValueError("not a plan: expected a JSON object with format, teacher, teacher_hash and surgery")
    if plan["format"] != FORMAT:
        raise ValueError(f"plan format is {plan['format']}; this version reads {FORMAT}; make the plan again")
    if not isinstance(plan["teacher"], str):
        raise ValueError("plan: teacher is no string; make the plan again")
    if plan["teacher_hash"] != config_hash(base):
        raise ValueError(
            f'the plan was made for teacher "{plan["teacher"]}", which has another shape; make a new plan'
        )
    section = _surgery(plan["surgery"])
    fault = _difference(plan, make_plan(base, section, plan["teacher"], _contexts(plan)), "")
    if fault:
        raise ValueError(f"plan: {fault}; the plan was edited or damaged, make it again")
    return section


def _surgery(fields: Any) -> SurgerySection:
    try:
        return SurgerySection.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("surgery", *first["loc"]))
        raise ValueError(f"plan: {place}: {first['msg']}; make the plan again") from None


def _contexts(plan: dict[str, Any]) -> tuple[int, ...]:
    """The lengths that the plan was made for."""
    try:
        contexts = tuple(int(context) for context in plan["after"]["flops_per_token"])
    except (LookupError, TypeError, ValueError):
        contexts = ()
    if not contexts or min(contexts) < 1:
        raise ValueError(
            "plan: after.flops_per_token is no object with lengths as keys, as 4096; make the plan again"
        )
    return contexts


def _difference(given: Any, made: Any, place: str) -> str | None:
    """The first place where a plan is not what was made again, in words. It goes only as deep as `made`."""
    if type(given) is not type(made):
        return f"{place} is {_shown(given)} where {_shown(made)} belongs"
    if isinstance(made, dict):
        odd = sorted(str(key) for key in given.keys() ^ made.keys())
        if odd:
            where = f"{place}.{odd[0]}".lstrip(".")
            return f"{where} is {'unknown' if odd[0] in given else 'missing'}"
        pairs = [(given[key], made[key], f"{place}.{key}".lstrip(".")) for key in made]
    elif isinstance(made, list):
        if len(given) != len(made):
            return f"{place} has {len(given)} entries where {len(made)} belong"
        pairs = [(*both, f"{place}[{index}]") for index, both in enumerate(zip(given, made, strict=True))]
    else:
        return None if given == made else f"{place} is {_shown(given)} where {_shown(made)} belongs"
    return next((fault for pair in pairs if (fault := _difference(*pair))), None)


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def sources(base: TeacherConfig, slot: Slot, index: int, section: SurgerySection) -> dict[str, str]:
    """What each new tensor of a converted slot is made from, in words."""
    body = anatomy(base)
    owner = body.owners[index]
    found: dict[str, str] = {}
    if "rwkv7" in slot.mixers:
        order = "permuted" if section.heads == "permuted" else "in plain blocks"
        if student_heads(base, section).blocks == 1:
            order = "one to one"
        bias = " and bias" if body.input_bias else ""
        found["rwkv7.receptance"] = f"layer {index} q_proj rows{bias} {order}{_folded(body)}"
        seen = "text" if settle(base, section).calibration_tokens else "noise"
        output = " with its bias," if body.output_bias else ""
        found["rwkv7.output"] = (
            f"layer {index} o_proj columns {order},{output} scaled to the teacher's rms on {seen}"
        )
        if "rwkv7" in slot.donors:
            found["rwkv7.key, value"] = f"none: slot {owner}'s, read at run time"
        elif owner != index and section.donor_keys_values == "ridge":
            found["rwkv7.key, value"] = (
                f"ridge regression of layer {owner}'s keys and values on layer {index}'s input"
            )
        else:
            found["rwkv7.key, value"] = f"layer {owner} {_keys_values(body, order, bias)}"
        sized = "queries and keys" if body.norm == "none" else "norm weights"
        found["rwkv7.r_norm, k_norm"] = f"ones times the rms of the teacher's {sized}"
        found["rwkv7.w*, a*"] = "hxa07c start"
        found["rwkv7.g*"] = "gate of one" if section.rwkv7.gate == "unit" else "published small gate"
    if "tica" in slot.mixers:
        fresh = section.tica.start == "fresh"
        blocks = f"layer {index} q_proj (keys and values: layer {owner}) blocks without rotary channels"
        found["tica.q, k, v"] = "random, std 0.02" if fresh else blocks
        if "tica" in slot.donors:
            found["tica.k, v"] = f"none: slot {owner}'s, read at run time"
        found["tica.o"] = "zero"
        found["tica.g*"] = "gate of one"
    return found


def _folded(body: Anatomy) -> str:
    norm = {"none": "", "weight": "its q_norm", "one_plus_weight": "1 + its q_norm"}[body.norm]
    scale = "" if body.score_scale == 1 else "the scale of scores"
    parts = " and ".join(part for part in (norm, scale) if part)
    return f", {parts} folded in" if parts else ""


def _keys_values(body: Anatomy, order: str, bias: str) -> str:
    norm = {"none": "", "weight": "k_norm", "one_plus_weight": "1 + k_norm"}[body.norm]
    if body.keys_are_values:
        text = f"k_proj rows{bias} {order}, with {norm} folded in for keys and without for values"
    else:
        text = f"k_proj and v_proj rows{bias} {order}" + (f", {norm} folded in" if norm else "")
    return f"{text}, value at rms 1" if body.value_norm else text
