"""The plan: what a surgery will do, before it is done, as one JSON object that is saved with the student."""

import hashlib
import json
from typing import Any

from trihybrid.models.gemma4.config import first_sharing_layer, key_value_owner, teacher_kinds
from trihybrid.models.pattern import Slot
from trihybrid.models.shapes import TeacherConfig
from trihybrid.surgery.cost import account
from trihybrid.surgery.layout import blueprint, donor_layer, score_width
from trihybrid.surgery.section import SurgerySection

FORMAT = 1
CONTEXTS = (4096, 32768, 131072)


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
    student = blueprint(base, section)
    slots = student.slots
    before = account(base, None, list(contexts))
    after = account(base, student, list(contexts))
    layers = [
        {
            "index": index,
            "before": teacher_kinds(base)[index],
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
        "warnings": warnings(base, slots, before, after),
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
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size", "query_pre_attn_scalar"):
        if fields.get(name) is not None:
            named[name] = fields[name]
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()


def check_plan(plan: dict[str, Any], base: TeacherConfig) -> SurgerySection:
    """The surgery section of a plan that was made for this teacher.

    Raises:
        ValueError: not a plan, another format, or the plan of another teacher.
    """
    if not isinstance(plan, dict) or not {"format", "teacher", "teacher_hash", "surgery"} <= set(plan):
        raise ValueError("not a plan: expected a JSON object with format, teacher, teacher_hash and surgery")
    if plan["format"] != FORMAT:
        raise ValueError(f"plan format is {plan['format']}; this version reads {FORMAT}; make the plan again")
    if plan["teacher_hash"] != config_hash(base):
        raise ValueError(
            f'the plan was made for teacher "{plan["teacher"]}", which has another shape; make a new plan'
        )
    return SurgerySection.model_validate(plan["surgery"])


def sources(base: TeacherConfig, slot: Slot, index: int, section: SurgerySection) -> dict[str, str]:
    """What each new tensor of a converted slot is made from, in words."""
    owner = key_value_owner(base, index)
    order = "permuted" if section.heads == "permuted" else "in plain blocks"
    projected = f"k_proj and v_proj rows {order}, k_norm folded in"
    if getattr(base, "attention_k_eq_v", False):
        projected = f"k_proj rows {order}, with k_norm folded in for keys and without for values"
    gemma3 = base.model_type == "gemma3_text"
    # Gemma 3 norms queries and keys by 1 + weight, scales scores, and does not norm values.
    projected = projected.replace("k_norm", "1 + k_norm") if gemma3 else f"{projected}, value at rms 1"
    folded = "1 + its q_norm and the scale of scores" if gemma3 else "its q_norm"
    seen = "text" if section.calibration_tokens else "noise"
    found: dict[str, str] = {}
    if "rwkv7" in slot.mixers:
        found["rwkv7.receptance"] = f"layer {index} q_proj rows {order}, {folded} folded in"
        found["rwkv7.output"] = f"layer {index} o_proj columns {order}, scaled to the teacher's rms on {seen}"
        if "rwkv7" in slot.donors:
            found["rwkv7.key, value"] = f"none: slot {owner}'s, read at run time"
        elif donor_layer(base, index) is None:
            found["rwkv7.key, value"] = f"layer {index} {projected}"
        elif section.donor_keys_values == "ridge":
            found["rwkv7.key, value"] = (
                f"ridge regression of layer {owner}'s keys and values on layer {index}'s input"
            )
        else:
            found["rwkv7.key, value"] = f"layer {owner} {projected}"
        found["rwkv7.r_norm, k_norm"] = "ones times the rms of the teacher's norm weights"
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


def warnings(
    base: TeacherConfig, slots: list[Slot], before: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    """What a user should know before the operation."""
    found = []
    if base.model_type == "gemma3_text":
        found.append(
            "a plan only: there is no converted Gemma 3 yet; its decoder layer has other norms, a scale of scores and "
            "no norm of values"
        )
    converted = [index for index, slot in enumerate(slots) if slot.converted]
    kv_before, kv_after = before["global_kv_bytes_per_token"], after["global_kv_bytes_per_token"]
    if kv_after > kv_before:
        found.append(
            f"keys and values that grow with context rise from {kv_before:,} to {kv_after:,} bytes a token: the "
            "teacher shares them between layers, the student does not; share TICA's as the teacher does, or use fewer "
            "TICA slots"
        )
    if not kv_after and kv_before:
        found.append(
            "nothing grows with context any more: exact recall beyond the window rests on the recurrence alone"
        )
    for index in range(len(slots)):
        consumers = [i for i in range(len(slots)) if i != index and key_value_owner(base, i) == index]
        own = [
            i
            for i in consumers
            if slots[i].converted and "rwkv7" in slots[i].mixers and "rwkv7" not in slots[i].donors
        ]
        if own:
            found.append(
                f"layer {index} lends keys and values to layers {own} in the teacher; after conversion they compute "
                "their own, which starts only near what they read before"
            )
    first_shared = first_sharing_layer(base)
    upper = [index for index in converted if index >= first_shared]
    sharing = f"layers {first_shared} to {base.num_hidden_layers - 1} of the teacher"
    if upper:
        found.append(
            f"{sharing} need only the last token of a prompt; with {upper} converted every token passes them, which "
            "gives up that fast prefill"
        )
    elif converted and first_shared < base.num_hidden_layers:
        found.append(
            f"{sharing} are kept and still need only the last token of a prompt: an engine that leaves out the others "
            "there keeps that fast prefill"
        )
    # Retained full slots cost what they cost before, so only converted ones are compared.
    pair_after = sum(after["layers"][index]["score_flops_per_pair"] for index in converted)
    if pair_after and all("tica" in slots[i].mixers for i in converted):
        ratio = 2 * score_width(base) * len(converted) / pair_after
        if abs(ratio - round(ratio)) < 1e-9:
            card = " (the card says up to 1/16)" if ratio < 16 else ""
            found.append(
                f"a query-key pair costs 1/{round(ratio)} of the teacher's score FLOPs in converted slots{card}"
            )
    return found
