"""From a teacher's configuration and a surgery section to slots, sizes and a student's configuration."""

from dataclasses import dataclass
from typing import Any

from transformers import Gemma4TextConfig

from trihybrid.mixers.rwkv7 import Rwkv7Options
from trihybrid.mixers.tica import TicaOptions
from trihybrid.models.gemma4.config import TrihybridGemma4Config, check_slots, key_value_owner, teacher_kinds
from trihybrid.models.pattern import Slot, parse_pattern
from trihybrid.models.shapes import TeacherConfig
from trihybrid.surgery.section import SurgerySection


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


def student_config(base: TeacherConfig, section: SurgerySection) -> TrihybridGemma4Config:
    """The configuration of the student that `section` makes of a teacher.

    Raises:
        ValueError: a layout or sizes that do not fit the teacher (see `layout`, `rwkv7_sizes`), or a teacher that is
            not a Gemma 4.
    """
    if not isinstance(base, Gemma4TextConfig):
        raise ValueError(
            f'the teacher\'s model_type is "{base.model_type}"; it can be planned, but only "gemma4_text" converted'
        )
    plan = blueprint(base, section)
    return TrihybridGemma4Config(
        # Where the teacher lay is nobody's business.
        base_config=base.to_dict() | {"_name_or_path": ""},
        slots=[slot.as_dict() for slot in plan.slots],
        rwkv7=plan.rwkv7,
        tica=plan.tica,
    )


def layout(base: TeacherConfig, section: SurgerySection) -> list[Slot]:
    """Slots with their donors.

    Raises:
        ValueError: unreadable pattern, another length, a slot that cannot stand where it does.
    """
    kinds = teacher_kinds(base)
    pattern = section.pattern
    if pattern is None:
        pattern = "".join("S" if kind == "sliding" else "R" for kind in kinds)
    slots = parse_pattern(pattern, section.legend, base.num_hidden_layers)
    for index, slot in enumerate(slots):
        if slot.converted and kinds[index] != "full":
            raise ValueError(
                f"slot {index} is a sliding layer of the teacher and cannot become {'+'.join(slot.mixers)}; "
                f"global layers are {[i for i, kind in enumerate(kinds) if kind == 'full']}"
            )
    shared = [Slot(slot.mixers, _donors(base, slots, index, section)) for index, slot in enumerate(slots)]
    check_slots(base, shared)
    return shared


def _donors(base: TeacherConfig, slots: list[Slot], index: int, section: SurgerySection) -> dict[str, int]:
    owner = key_value_owner(base, index)
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


def rwkv7_sizes(base: TeacherConfig, section: SurgerySection) -> dict[str, int | str]:
    """Heads of the student: each global head of the teacher splits into blocks of `rwkv7.head_dim` channels.

    Raises:
        ValueError: the blocks do not come out even, or rotary pairs would be cut apart.
    """
    wide = base.per_layer_config["full_attention"]
    width = section.rwkv7.head_dim
    if wide.head_dim % width:
        raise ValueError(
            f"surgery.rwkv7.head_dim is {width}; it must divide the teacher's global head width, {wide.head_dim}"
        )
    pairs = rotary_pairs(base)
    if section.heads == "permuted" and 2 * pairs > width and wide.head_dim > width:
        raise ValueError(
            f"surgery.rwkv7.head_dim is {width}; the teacher's {pairs} rotary pairs a head need {2 * pairs} channels "
            'in one block; take a wider head_dim, or heads: "plain", which lets pairs be cut apart'
        )
    blocks = wide.head_dim // width
    heads = {"heads": base.num_attention_heads * blocks, "kv_heads": wide.num_key_value_heads * blocks}
    return heads | section.rwkv7.model_dump()


def rotary_pairs(base: TeacherConfig) -> int:
    """Channel pairs (c, c + D/2) of the D channels of a global head that carry a position; the rest match content."""
    fraction = base.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0)
    return int(fraction * base.per_layer_config["full_attention"].head_dim // 2)


def donor_layer(base: TeacherConfig, index: int) -> int | None:
    """The teacher's layer that lends keys and values to layer `index`, or None where it has its own."""
    owner = key_value_owner(base, index)
    return None if owner == index else owner


def score_width(base: TeacherConfig) -> int:
    """Multiply-adds that one query-key pair costs in a global layer of the teacher: heads times head width."""
    return base.num_attention_heads * base.per_layer_config["full_attention"].head_dim
