"""Configuration of a converted decoder: the teacher's configuration verbatim, and what stands in each slot."""

from typing import Any, ClassVar, Protocol

from transformers import PreTrainedConfig

from trihybrid.mixers.rwkv7 import Rwkv7Options
from trihybrid.mixers.tica import TicaOptions
from trihybrid.models.anatomy import TYPES, Anatomy, anatomy
from trihybrid.models.pattern import Slot
from trihybrid.models.shapes import TeacherConfig

COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_activation",
    "hidden_act",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
"""Fields of the teacher that generic code reads on top, where it has them. `num_kv_shared_layers` is not among them:
with it, transformers builds a cache that stops at the first sharing layer and has no slot for the recurrences above."""

MEDIA_TOKENS = {
    "image_token_id": ("image_token_id", "image_token_index"),
    "audio_token_id": ("audio_token_id",),
    "video_token_id": ("video_token_id",),
}
"""The tokens in whose place a multimodal model puts an image, sound or video -> how its configuration may spell them.
They travel in the text model's configuration, and a prompt that holds one is refused."""

DERIVED = ("layer_types", "sliding_window", "final_logit_softcapping")
"""Fields on top that follow from the teacher and the slots."""


def media_tokens(config: PreTrainedConfig) -> dict[int, str]:
    """Id -> name of the tokens in whose place a multimodal model puts an image, sound or video, of a teacher or a
    student."""
    found = {getattr(config, name, None): name for name in MEDIA_TOKENS}
    return {token: name for token, name in found.items() if token is not None}


class SlotSizes(Protocol):
    """What converted slots are built from: a student's configuration, or a plan of one."""

    def slot_list(self) -> list[Slot]:
        """One slot a layer."""
        ...

    def rwkv7_options(self) -> Rwkv7Options:
        """Sizes of rwkv7, where a slot holds it."""
        ...

    def tica_options(self) -> TicaOptions:
        """Sizes of tica, where a slot holds it."""
        ...


class HybridConfig(PreTrainedConfig):
    """The teacher's configuration (`base_config`), one entry a layer (`slots`), sizes of our mixers (`rwkv7`, `tica`).

    A family's own class names its model type and the class of its teachers' configurations.

    Args:
        base_config: dictionary of the teacher's configuration, verbatim.
        slots: one `{"mixers": [..], "donors": {..}}` a layer, with `"window": n` where a full layer of the teacher
            became a sliding one; empty means the teacher's own layout.
        rwkv7: fields of `Rwkv7Options` but the hidden size, if any slot has the mixer.
        tica: fields of `TicaOptions` but the hidden size, if any slot has the mixer.
        nope: whether retained attention has no positions, as in published hybrids whose attention was trained without.
        use_cache: whether a forward pass that is not told makes a cache, as in the teacher.

    Raises:
        ValueError: a field that is no object or no list; a slot list of another length, or donors that cannot work
            (see `check_slots`).
    """

    teacher_config: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    base_config: dict | None = None
    slots: list | None = None
    rwkv7: dict | None = None
    tica: dict | None = None
    nope: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in (("base_config", dict), ("slots", list), ("rwkv7", dict), ("tica", dict)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"{name} is {value!r:.80}; it must be {'a list' if kind is list else 'an object'}, or null"
                )
        base = self.teacher_config.from_dict(dict(self.base_config or {}))
        self.base_config = base.to_dict()
        body = anatomy(base)
        if not self.slots:
            self.slots = [Slot((kind,)).as_dict() for kind in body.kinds]
        slots = [Slot.from_dict(slot) for slot in self.slots]
        check_slots(base, slots)
        # Of the whole, transformers hands out no field that differs between kinds of layers; on top stand the sliding
        # ones.
        typical = base.per_layer_config[body.kinds.index("sliding") if "sliding" in body.kinds else 0]
        for name in COPIED:
            if hasattr(typical, name):
                setattr(self, name, getattr(typical, name))
        for name in MEDIA_TOKENS:
            if getattr(base, name, None) is not None:
                setattr(self, name, getattr(base, name))
        self.layer_types = [_layer_type(slot) for slot in slots]
        self.sliding_window = next((slot.window for slot in slots if slot.window), body.window)
        self.final_logit_softcapping = body.softcap
        kwargs = {
            name: value for name, value in kwargs.items() if name not in (*COPIED, *DERIVED, *MEDIA_TOKENS)
        }
        super().__post_init__(**kwargs)

    def base(self) -> TeacherConfig:
        """The teacher's configuration as an object, with this one's choice of attention implementation."""
        base = self.teacher_config.from_dict(dict(self.base_config or {}))
        base._attn_implementation = self._attn_implementation
        return base

    def media_tokens(self) -> dict[int, str]:
        """As the function of that name."""
        return media_tokens(self)

    def slot_list(self) -> list[Slot]:
        return [Slot.from_dict(slot) for slot in self.slots or []]

    def rwkv7_options(self) -> Rwkv7Options:
        if not self.rwkv7:
            raise ValueError(
                'a slot holds rwkv7, but "rwkv7" gives no sizes; set heads, kv_heads, head_dim and the ranks'
            )
        return Rwkv7Options(
            hidden_size=self.hidden_size, norm_epsilon=self.rms_norm_eps, **(self.rwkv7 or {})
        )

    def tica_options(self) -> TicaOptions:
        return TicaOptions(hidden_size=self.hidden_size, norm_epsilon=self.rms_norm_eps, **(self.tica or {}))


def check_slots(base: TeacherConfig, slots: list[Slot]) -> None:
    """Refuse layouts that cannot run.

    Raises:
        ValueError: wrong number of slots; mixers that cannot share a slot; a retained slot of another kind than the
            teacher's, but for a full layer that becomes a sliding one; windows that differ; a retained slot whose donor
            of keys and values is converted or sees another window; a donor that is missing or that no mixer reads; no
            slot that stores keys and values, by which transformers counts tokens.
    """
    body = anatomy(base)
    if len(slots) != len(body.attentions):
        raise ValueError(f"slots has {len(slots)} entries, the teacher has {len(body.attentions)} layers")
    for index, slot in enumerate(slots):
        stray = [kind for kind in slot.donors if kind not in slot.mixers or not slot.converted]
        if stray:
            raise ValueError(
                f"slot {index}: donors are given for {stray}; only a mixer of ours in the slot can have one"
            )
        if slot.converted:
            _check_converted(slots, index)
        else:
            _check_retained(body, slots, index)
    if not any(slot.grows or slot.mixers == ("sliding",) for slot in slots):
        raise ValueError(
            "no slot stores keys and values; keep one sliding, full or tica slot, by which tokens are counted"
        )


def _check_converted(slots: list[Slot], index: int) -> None:
    slot = slots[index]
    if not set(slot.mixers) <= {"rwkv7", "tica"} or len(set(slot.mixers)) != len(slot.mixers):
        raise ValueError(
            f'slot {index} is "{"+".join(slot.mixers)}"; a converted slot holds rwkv7, tica or both, each once'
        )
    for kind, donor in slot.donors.items():
        if not 0 <= donor < index or kind not in slots[donor].mixers or kind in slots[donor].donors:
            raise ValueError(
                f"slot {index}: {kind} reads keys and values of slot {donor}, which is not an earlier slot "
                f"with a {kind} of its own"
            )


def _check_retained(body: Anatomy, slots: list[Slot], index: int) -> None:
    slot, kind, owner = slots[index], body.attentions[index].kind, body.attentions[index].owner
    becomes_sliding = slot.mixers == ("sliding",) and kind == "full"
    if slot.mixers != (kind,) and not becomes_sliding:
        raise ValueError(
            f'slot {index} is "{"+".join(slot.mixers)}", the teacher\'s layer is "{kind}"; '
            "a retained slot keeps the teacher's attention, or a full one becomes sliding"
        )
    if becomes_sliding and (not isinstance(slot.window, int) or slot.window < 1):
        raise ValueError(
            f'slot {index} is "sliding", the teacher\'s layer is "full", and its window is {slot.window!r}; give it '
            "one in tokens, at least 1, as {mixer: sliding, window: 1024}"
        )
    # transformers' masks and caches know one window for all layers, and so do the teacher's beside the student's.
    windows = {s.window for s in slots if s.window} | ({body.window} if "sliding" in body.kinds else set())
    if len(windows) > 1:
        raise ValueError(
            f"slots have windows of {sorted(filter(None, windows))} tokens; all sliding slots of a model share one, "
            f"the teacher's where it has one ({body.window})"
        )
    if slots[owner].converted:
        raise ValueError(
            f"slot {index} is retained and reads the keys and values of layer {owner}, which is converted; "
            f"convert slot {index} too or keep layer {owner}"
        )
    if slots[owner].mixers != slot.mixers:
        raise ValueError(
            f"slot {index} is {slot.mixers[0]} and reads the keys and values of layer {owner}, which is "
            f"{slots[owner].mixers[0]}; let both be of one kind"
        )


def _layer_type(slot: Slot) -> str:
    if not slot.converted:
        return TYPES[slot.mixers[0]]
    if "rwkv7" in slot.mixers:
        return "hybrid" if slot.grows else "linear_attention"
    # A slot of tica alone is to transformers a full attention with few heads; with a donor it stores nothing.
    return "full_attention" if slot.grows else "linear_attention"
