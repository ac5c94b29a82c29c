"""Configuration of a converted Gemma-4: the teacher's text configuration verbatim, and what stands in each slot."""

from typing import Any, Protocol

from transformers import Gemma4TextConfig, PreTrainedConfig

from trihybrid.mixers.rwkv7 import Rwkv7Options
from trihybrid.mixers.tica import TicaOptions
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
    "sliding_window",
    "rms_norm_eps",
    "hidden_activation",
    "final_logit_softcapping",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
"""Fields of the teacher that generic code reads on top. `num_kv_shared_layers` is not among them: with it, transformers
builds a cache that stops at the first sharing layer and has no slot for the recurrences above."""


MEDIA_TOKENS = ("image_token_id", "audio_token_id", "video_token_id")
"""Fields of a multimodal configuration: the tokens in whose place an image, sound or video is put. They travel in the
text model's configuration, and a prompt that holds one is refused."""


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


class TrihybridGemma4Config(PreTrainedConfig):
    """Teacher's text configuration (`base_config`), one entry a layer (`slots`), sizes of our mixers (`rwkv7`, `tica`).

    Args:
        base_config: dictionary of the teacher's `Gemma4TextConfig`, verbatim.
        slots: one `{"mixers": [..], "donors": {..}}` a layer; empty means the teacher's own layout.
        rwkv7: fields of `Rwkv7Options` but the hidden size, if any slot has the mixer.
        tica: fields of `TicaOptions` but the hidden size, if any slot has the mixer.
        use_cache: whether a forward pass that is not told makes a cache, as in the teacher.

    Raises:
        ValueError: a slot list of another length, or donors that cannot work (see `check_slots`).
    """

    model_type = "trihybrid_gemma4"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    base_config: dict | None = None
    slots: list | None = None
    rwkv7: dict | None = None
    tica: dict | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        base = Gemma4TextConfig.from_dict(dict(self.base_config)) if self.base_config else Gemma4TextConfig()
        self.base_config = base.to_dict()
        if not self.slots:
            self.slots = [Slot((_KIND_OF_TYPE[kind],)).as_dict() for kind in base.layer_types]
        slots = [Slot.from_dict(slot) for slot in self.slots]
        check_slots(base, slots)
        # Of the whole, transformers hands out no field that differs between kinds of layers; on top stand the sliding
        # ones.
        kind = "sliding_attention" if "sliding_attention" in base.layer_types else "full_attention"
        typical = base.per_layer_config[kind]
        for name in COPIED:
            setattr(self, name, getattr(typical, name))
        for name in MEDIA_TOKENS:
            setattr(self, name, getattr(base, name, None))
        self.layer_types = [_layer_type(slot) for slot in slots]
        given = (*COPIED, *MEDIA_TOKENS, "layer_types")
        kwargs = {name: value for name, value in kwargs.items() if name not in given}
        super().__post_init__(**kwargs)

    def base(self) -> Gemma4TextConfig:
        """The teacher's configuration as an object, with this one's choice of attention implementation."""
        base = Gemma4TextConfig.from_dict(dict(self.base_config or {}))
        base._attn_implementation = self._attn_implementation
        return base

    def slot_list(self) -> list[Slot]:
        return [Slot.from_dict(slot) for slot in self.slots or []]

    def media_tokens(self) -> dict[int, str]:
        """Id -> name of the tokens in whose place a multimodal model puts an image, sound or video."""
        found = {getattr(self, name): name for name in MEDIA_TOKENS}
        return {token: name for token, name in found.items() if token is not None}

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


_KIND_OF_TYPE = {"sliding_attention": "sliding", "full_attention": "full"}


def teacher_kinds(base: TeacherConfig) -> list[str]:
    """`sliding` or `full` for each layer of a teacher."""
    return [_KIND_OF_TYPE[kind] for kind in base.layer_types]


def first_sharing_layer(base: TeacherConfig) -> int:
    """The first layer without keys and values of its own; as many as there are layers where each has its own, as in all
    of Gemma 3."""
    return base.num_hidden_layers - getattr(base, "num_kv_shared_layers", 0)


def key_value_owner(base: TeacherConfig, index: int) -> int:
    """The layer whose keys and values layer `index` of the teacher reads: itself, or the last layer of its own type
    before the sharing ones."""
    first_shared = first_sharing_layer(base)
    if index < first_shared:
        return index
    kind = base.layer_types[index]
    return max(i for i in range(first_shared) if base.layer_types[i] == kind)


def check_slots(base: TeacherConfig, slots: list[Slot]) -> None:
    """Refuse layouts that cannot run.

    Raises:
        ValueError: wrong number of slots; mixers that cannot share a slot; a retained slot of another kind than the
            teacher's; a retained slot whose donor of keys and values is converted; a donor that is missing or that no
            mixer reads; no slot that stores keys and values, by which transformers counts tokens.
    """
    if len(slots) != base.num_hidden_layers:
        raise ValueError(f"slots has {len(slots)} entries, the teacher has {base.num_hidden_layers} layers")
    kinds = teacher_kinds(base)
    for index, slot in enumerate(slots):
        stray = [kind for kind in slot.donors if kind not in slot.mixers or not slot.converted]
        if stray:
            raise ValueError(
                f"slot {index}: donors are given for {stray}; only a mixer of ours in the slot can have one"
            )
        if slot.converted:
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
        elif slot.mixers != (kinds[index],):
            raise ValueError(
                f'slot {index} is "{"+".join(slot.mixers)}", the teacher\'s layer is "{kinds[index]}"; '
                "a retained slot keeps the teacher's attention"
            )
        else:
            owner = key_value_owner(base, index)
            if slots[owner].converted:
                raise ValueError(
                    f"slot {index} is retained and reads the keys and values of layer {owner}, which is converted; "
                    f"convert slot {index} too or keep layer {owner}"
                )
    if not any(slot.grows or slot.mixers == ("sliding",) for slot in slots):
        raise ValueError(
            "no slot stores keys and values; keep one sliding, full or tica slot, by which tokens are counted"
        )


def _layer_type(slot: Slot) -> str:
    if not slot.converted:
        return "sliding_attention" if slot.mixers == ("sliding",) else "full_attention"
    if "rwkv7" in slot.mixers:
        return "hybrid" if slot.grows else "linear_attention"
    # A slot of tica alone is to transformers a full attention with few heads; with a donor it stores nothing.
    return "full_attention" if slot.grows else "linear_attention"
