"""From a teacher's configuration and a surgery section to slots, sizes and a student's configuration."""

from dataclasses import dataclass
from typing import Any

from trihybrid.mixers.rwkv7 import Rwkv7Options
from trihybrid.mixers.tica import TicaOptions
from trihybrid.models.anatomy import Anatomy, anatomy
from trihybrid.models.decoder.config import HybridConfig, check_slots
from trihybrid.models.families import family_of
from trihybrid.models.pattern import Slot, parse_pattern
from trihybrid.models.shapes import TeacherConfig
from trihybrid.surgery.inherit import Heads
from trihybrid.surgery.section import SurgerySection

CALIBRATION_TOKENS = 8192
"""Tokens of text that scales are fitted on where they are needed and the section does not say how many."""


def settle(base: TeacherConfig, section: SurgerySection) -> SurgerySection:
    """The section with what it leaves to the teacher: how much text scales are fitted on.

    A norm behind the attention (Gemma's) takes the scale of a slot's output out again, so that a rough one will do. In
    other families the residual stream receives it, and a token's own values say too little of it.

    Raises:
        ValueError: no text, for a teacher that needs some.
    """
    forgets = anatomy(base).post_norm is not None
    if section.calibration_tokens is None:
        none = forgets and section.donor_keys_values != "ridge"
        return section.model_copy(update={"calibration_tokens": 0 if none else CALIBRATION_TOKENS})
    if not section.calibration_tokens and not forgets:
        raise ValueError(
            f"surgery.calibration_tokens is 0, but no norm stands behind the attention of a {base.model_type}: scales "
            f"of its students are fitted on text; leave it away ({CALIBRATION_TOKENS} then), or set at least 256"
        )
    return section


@dataclass(frozen=True)
class Blueprint:
    """All that decides the size of a student: its teacher, its slots, and the fields of our mixers' options without
    those that the teacher gives (None where no slot holds the mixer)."""

    base: TeacherConfig
    slots: list[Slot]
    rwkv7: dict[str, Any] | None
    tica: dict[str, Any] | None

    def slot_list(self) -> list[Slot]:
        return self.slots

    def rwkv7_options(self) -> Rwkv7Options:
        return Rwkv7Options(**self._given(), **(self.rwkv7 or {}))

    def tica_options(self) -> TicaOptions:
        return TicaOptions(**self._given(), **(self.tica or {}))

    def _given(self) -> dict[str, Any]:
        return {"hidden_size": self.base.hidden_size, "norm_epsilon": self.base.rms_norm_eps}


def blueprint(base: TeacherConfig, section: SurgerySection) -> Blueprint:
    """The student that `section` makes of a teacher, on paper.

    Raises:
        ValueError: a layout or sizes that do not fit the teacher (see `layout`, `rwkv7_sizes`).
    """
    slots = layout(base, section)
    kinds = {kind for slot in slots for kind in slot.mixers}
    return Blueprint(
        base,
        slots,
        rwkv7=rwkv7_sizes(base, section) if "rwkv7" in kinds else None,
        tica=section.tica.model_dump(exclude={"start"}) if "tica" in kinds else None,
    )


def student_config(base: TeacherConfig, section: SurgerySection) -> HybridConfig:
    """The configuration of the student that `section` makes of a teacher, of its family's class.

    Raises:
        ValueError: a layout or sizes that do not fit the teacher (see `layout`, `rwkv7_sizes`).
    """
    plan = blueprint(base, section)
    return family_of(base).student.config_class(
        # Where the teacher lay is nobody's business.
        base_config=base.to_dict() | {"_name_or_path": ""},
        slots=[slot.as_dict() for slot in plan.slots],
        rwkv7=plan.rwkv7,
        tica=plan.tica,
    )


def window_of(base: TeacherConfig, section: SurgerySection) -> int | None:
    """Tokens that the sliding attentions of teacher and student see: the teacher's window, or that of its full layers
    which become sliding ones; None where there is no window.

    Raises:
        ValueError: see `layout`.
    """
    return student_config(base, section).sliding_window


def layout(base: TeacherConfig, section: SurgerySection) -> list[Slot]:
    """Slots with their donors; a full layer of the teacher that becomes a sliding one with its window.

    Raises:
        ValueError: unreadable pattern, another length, a slot that cannot stand where it does.
    """
    body = anatomy(base)
    pattern = section.pattern
    if pattern is None:
        if "full" not in body.kinds:
            raise ValueError(
                "surgery.pattern is none, which converts every global layer, and the teacher has none; give a pattern "
                f"of {len(body.kinds)} letters"
            )
        pattern = "".join("S" if kind == "sliding" else "R" for kind in body.kinds)
    slots = parse_pattern(pattern, section.legend, len(body.attentions))
    template = body.template
    for index, (slot, attention) in enumerate(zip(slots, body.attentions, strict=True)):
        if slot.converted and attention.sizes != template.sizes:
            raise ValueError(
                f"slot {index} is a sliding layer of the teacher, with heads of another size, and cannot become "
                f"{'+'.join(slot.mixers)}; global layers are {[i for i, k in enumerate(body.kinds) if k == 'full']}"
            )
    shared = [
        Slot(slot.mixers, _donors(body, slots, index, section), _window(body, slot, index))
        for index, slot in enumerate(slots)
    ]
    check_slots(base, shared)
    return shared


def _window(body: Anatomy, slot: Slot, index: int) -> dict[str, int]:
    """The window of a full layer that becomes a sliding one: the legend's, or else the teacher's. Of a layer that is
    sliding in the teacher the legend may only repeat it."""
    if slot.mixers != ("sliding",):
        return {}
    if body.kinds[index] == "sliding" and slot.window in (None, body.window):
        return {}
    window = slot.window or body.window
    return {} if window is None else {"window": window}


def _donors(body: Anatomy, slots: list[Slot], index: int, section: SurgerySection) -> dict[str, int]:
    owner = body.owners[index]
    if not slots[index].converted or owner == index:
        return {}
    wanted = {"tica": section.share_kv == "teacher", "rwkv7": section.donor_keys_values == "share"}
    for kind in slots[index].mixers:
        if wanted[kind] and kind not in slots[owner].mixers:
            raise ValueError(
                f"slot {index}: {kind} would share keys and values of layer {owner}, whose slot holds "
                f"{'+'.join(slots[owner].mixers)}; give slot {owner} a {kind}, or do not share"
            )
    return {kind: owner for kind in slots[index].mixers if wanted[kind]}


def student_heads(base: TeacherConfig, section: SurgerySection) -> Heads:
    """How heads of the teacher become heads of rwkv7: blocks of `rwkv7.head_dim` channels, or one to one where the
    teacher's are no wider.

    Raises:
        ValueError: the blocks do not come out even, or rotary pairs would be cut apart.
    """
    template = anatomy(base).template
    narrow = min(section.rwkv7.head_dim, template.head_dim)
    if template.head_dim % narrow:
        raise ValueError(
            f"surgery.rwkv7.head_dim is {narrow}; it must divide the teacher's global head width, {template.head_dim}"
        )
    heads = Heads(
        query=template.heads,
        groups=template.kv_heads,
        width=template.head_dim,
        narrow=narrow,
        rotary_pairs=template.rotary_pairs,
        permuted=section.heads == "permuted",
    )
    if heads.permuted and heads.blocks > 1 and narrow % 2:
        raise ValueError(
            f"surgery.rwkv7.head_dim is {narrow}, an odd number; blocks of it would cut one of the teacher's "
            f'{template.rotary_pairs} rotary pairs a head apart; take an even one, or heads: "plain"'
        )
    return heads


def rwkv7_sizes(base: TeacherConfig, section: SurgerySection) -> dict[str, Any]:
    """Fields of `Rwkv7Options` that follow from a teacher and a section, without those that every mixer has.

    Raises:
        ValueError: see `student_heads`.
    """
    heads, body = student_heads(base, section), anatomy(base)
    sizes: dict[str, Any] = {"heads": heads.query * heads.blocks, "kv_heads": heads.groups * heads.blocks}
    biases = {"input_bias": body.input_bias, "output_bias": body.output_bias}
    return (
        sizes
        | section.rwkv7.model_dump()
        | {"head_dim": heads.narrow}
        | {n: b for n, b in biases.items() if b}
    )
