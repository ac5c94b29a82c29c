"""What a plan tells its reader beside its numbers: what the student gives up, and what may surprise."""

from typing import Any

from trihybrid.models.anatomy import Anatomy, anatomy
from trihybrid.models.pattern import Slot
from trihybrid.models.shapes import TeacherConfig
from trihybrid.surgery.section import SurgerySection


def warnings(
    base: TeacherConfig,
    section: SurgerySection,
    slots: list[Slot],
    before: dict[str, Any],
    after: dict[str, Any],
) -> list[str]:
    """What a user should know before the operation."""
    body = anatomy(base)
    converted = [index for index, slot in enumerate(slots) if slot.converted]
    return [
        *_heads_notes(body, section, slots),
        *_cache_notes(body, slots, before, after),
        *_sharing_notes(body, slots, converted),
        *_score_notes(base, slots, converted, after),
    ]


def _heads_notes(body: Anatomy, section: SurgerySection, slots: list[Slot]) -> list[str]:
    found = []
    template = body.template
    if any("rwkv7" in slot.mixers for slot in slots):
        if template.head_dim < section.rwkv7.head_dim:
            found.append(
                f"the teacher's heads are {template.head_dim} channels wide, and so are the student's: "
                f"rwkv7.head_dim, {section.rwkv7.head_dim}, splits wider ones only"
            )
        if 2 * template.rotary_pairs == template.head_dim:
            found.append(
                "all channels of the teacher's heads turn with their position, and rwkv7 has none: queries meet keys "
                "as at distance 0"
            )
    narrowed = [index for index, slot in enumerate(slots) if slot.window]
    if narrowed:
        found.append(
            f"layers {narrowed} keep their weights and see {slots[narrowed[0]].window:,} tokens instead of all"
        )
    return found


def _cache_notes(
    body: Anatomy, slots: list[Slot], before: dict[str, Any], after: dict[str, Any]
) -> list[str]:
    kv_before, kv_after = before["global_kv_bytes_per_token"], after["global_kv_bytes_per_token"]
    if kv_after > kv_before:
        why = (
            "the teacher shares them between layers, the student does not; share TICA's as the teacher does, or use "
            "fewer TICA slots"
            if body.first_sharing_layer < len(slots)
            else "TICA stores more in its slots than the teacher did; use fewer TICA slots, or smaller ones"
        )
        return [
            f"keys and values that grow with context rise from {kv_before:,} to {kv_after:,} bytes a token: {why}"
        ]
    if not kv_after and kv_before:
        return [
            "nothing grows with context any more: exact recall beyond the window rests on the recurrence alone"
        ]
    return []


def _sharing_notes(body: Anatomy, slots: list[Slot], converted: list[int]) -> list[str]:
    found = []
    for index in range(len(slots)):
        own = [
            i
            for i in converted
            if i != index
            and body.owners[i] == index
            and "rwkv7" in slots[i].mixers
            and "rwkv7" not in slots[i].donors
        ]
        if own:
            found.append(
                f"layer {index} lends keys and values to layers {own} in the teacher; after conversion they compute "
                "their own, which starts only near what they read before"
            )
    first_shared = body.first_sharing_layer
    upper = [index for index in converted if index >= first_shared]
    sharing = f"layers {first_shared} to {len(slots) - 1} of the teacher"
    if upper:
        found.append(
            f"{sharing} need only the last token of a prompt; with {upper} converted every token passes them, which "
            "gives up that fast prefill"
        )
    elif converted and first_shared < len(slots):
        found.append(
            f"{sharing} are kept and still need only the last token of a prompt: an engine that leaves out the others "
            "there keeps that fast prefill"
        )
    return found


def _score_notes(
    base: TeacherConfig, slots: list[Slot], converted: list[int], after: dict[str, Any]
) -> list[str]:
    body = anatomy(base)
    # Retained full slots cost what they cost before, so only converted ones are compared.
    pair_after = sum(after["layers"][index]["score_flops_per_pair"] for index in converted)
    if not pair_after or not all("tica" in slots[i].mixers and body.kinds[i] == "full" for i in converted):
        return []
    ratio = 2 * sum(body.attentions[index].width for index in converted) / pair_after
    if abs(ratio - round(ratio)) >= 1e-9:
        return []
    card = " (the card says up to 1/16)" if ratio < 16 and base.model_type == "gemma4_text" else ""
    return [f"a query-key pair costs 1/{round(ratio)} of the teacher's score FLOPs in converted slots{card}"]
