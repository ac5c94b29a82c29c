"""Building the converted slots of a student, one after the other, from what its teacher's attentions are made of.

A slot starts from a seed of its own, takes what it can from the teacher's tensors, and is scaled. Whether those tensors
lie in memory or on the disk, and whether the student is a model or a file, is not known here.

Legend: B batch, T time, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Gemma4TextConfig

from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.span import packed
from trihybrid.mixers.tica import Tica
from trihybrid.models.drawing import drawing, one_thread
from trihybrid.models.gemma4.config import TrihybridGemma4Config, key_value_owner
from trihybrid.models.gemma4.slot import ConvertedSlot
from trihybrid.models.gemma4.streamed import streamed_model
from trihybrid.models.source import TensorSource
from trihybrid.surgery.calibrate import LayerRecord, noise, noise_record, record_layers
from trihybrid.surgery.gemma4 import read_attention, teacher_heads
from trihybrid.surgery.inherit import rms
from trihybrid.surgery.layout import student_config
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.transplant import (
    RWKV7_INHERITED,
    TICA_INHERITED,
    AttentionWeights,
    fit_keys_values,
    inherit_rwkv7,
    inherit_tica,
)

Block = tuple[Tensor, Tensor]
"""Calibration tokens: (input_ids, position_ids), both int64 [B, T]."""


@dataclass(frozen=True)
class BuiltSlot:
    """One slot of a student.

    Attributes:
        index: of the layer.
        slot: its mixers, in at least float32.
        inherited: names of its parameters that the teacher's tensors gave rise to; the others are drawn, or have a
            start of their own.
        sources: names of those tensors in the teacher.
    """

    index: int
    slot: ConvertedSlot
    inherited: frozenset[str]
    sources: frozenset[str]


@torch.no_grad()
def build_slots(
    source: TensorSource,
    base: Gemma4TextConfig,
    section: SurgerySection,
    tokens: Sequence[Block] = (),
    seed: int = 0,
) -> Iterator[BuiltSlot]:
    """The converted slots of the student that `section` makes of a teacher, lowest first, each built when it is asked
    for.

    Args:
        source: the teacher's tensors.
        base: its text configuration.
        section: what shall stand in each slot.
        tokens: text to fit scales on; without it they come from the teacher's weights alone.
        seed: of all that is drawn; a slot's draw depends on it and on the slot's index alone.

    Raises:
        ValueError: text where the section says none, or none where it says some; a tensor of the teacher is missing.
    """
    _check_tokens(section, tokens)
    config = student_config(base, section)
    converted = [i for i, slot in enumerate(config.slot_list()) if slot.converted]
    builder = _Builder(source, base, section, config, seed)
    if tokens and converted:
        wanted = sorted({key_value_owner(base, index) for index in converted} | set(converted))
        builder.records = record_layers(streamed_model(base, source, builder.dtype), tokens, wanted)
        builder.positions = [positions for _, positions in tokens]
    builder.shared = [Shared() for _ in builder.positions]
    for index in converted:
        # The same bits whatever the machine, and whatever else it does.
        with one_thread():
            built = builder.build(index)
        yield built


def _check_tokens(section: SurgerySection, tokens: Sequence[Block]) -> None:
    wanted = section.calibration_tokens
    if wanted and not tokens:
        raise ValueError(
            f"no calibration tokens, but surgery.calibration_tokens is {wanted}; give at least one block of "
            "(input_ids, position_ids), or set it to 0"
        )
    if tokens and not wanted:
        raise ValueError(
            "calibration tokens are given, but surgery.calibration_tokens is 0: scales come from the teacher's weights "
            "alone; leave the tokens away, or set how many there shall be"
        )


@dataclass
class _Builder:
    """What all slots of one student have in common.

    Attributes:
        records: what the teacher's layers see and say on text; empty where scales come from noise.
        positions: restarting positions of the blocks that slots are scaled on.
        shared: what slots published on each block, for slots above that read it.
    """

    source: TensorSource
    base: Gemma4TextConfig
    section: SurgerySection
    config: TrihybridGemma4Config
    seed: int
    records: dict[int, LayerRecord] = field(default_factory=dict)
    positions: list[Tensor] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept = self.source.read("model.norm.weight")
        # Scales are fitted before anything is rounded to the teacher's dtype.
        self.dtype = torch.promote_types(kept.dtype, torch.float32)
        self.heads = teacher_heads(self.base, self.section)
        self.u_1TD = noise(
            self.base.hidden_size, self.seed, torch.empty(0, dtype=self.dtype, device=kept.device)
        )
        self.positions = [torch.arange(self.u_1TD.shape[1], device=kept.device)[None]]

    def build(self, index: int) -> BuiltSlot:
        attention = read_attention(self.source, self.base, index, self.dtype)
        record = self._record(index, attention)
        fitted = attention
        if attention.owner != index and self.section.donor_keys_values == "ridge":
            fitted = fit_keys_values(attention, record, self.records[attention.owner], self.section.ridge)
        slot = self._drawn(index)
        inherited = set()
        for mixer in slot.mixers():
            if isinstance(mixer, Rwkv7):
                inherit_rwkv7(mixer, fitted, self.heads, record)
                inherited |= {f"rwkv7.{name}" for name in RWKV7_INHERITED}
            elif isinstance(mixer, Tica) and self.section.tica.start == "inherited":
                inherit_tica(mixer, attention, self.heads)
                inherited |= {f"tica.{name}" for name in TICA_INHERITED}
        self._scale(slot, record)
        found = frozenset(inherited & {name for name, _ in slot.named_parameters()})
        return BuiltSlot(index, slot, found, attention.names if found else frozenset())

    def _record(self, index: int, attention: AttentionWeights) -> LayerRecord:
        if self.records:
            return self.records[index]
        return noise_record(
            self.u_1TD,
            attention.gain_D,
            attention.value.unflatten(0, (self.heads.groups, self.heads.width)),
            attention.output,
            value_norm=True,
            epsilon=self.base.rms_norm_eps,
        )

    def _drawn(self, index: int) -> ConvertedSlot:
        """The slot at its start, which nothing but the seed and the index decide."""
        with torch.device("meta"):
            slot = ConvertedSlot(self.config, index)
        slot.to_empty(device="cpu")
        with drawing((self.seed << 16) + index):
            for mixer in slot.mixers():
                mixer.initialise(index, self.base.num_hidden_layers, copy_into)
        return slot.to(self.u_1TD.device, self.dtype)

    def _scale(self, slot: ConvertedSlot, record: LayerRecord) -> None:
        """Scale the output projection so that the slot's output has the rms of the teacher's attention on the same
        inputs (TICA starts at zero and adds nothing). Also fills `shared` for slots above."""
        outputs = [
            slot.mix(x_BTD, packed(positions.expand(x_BTD.shape[:2])), shared, None)
            for x_BTD, positions, shared in zip(record.inputs, self.positions, self.shared, strict=True)
        ]
        if hasattr(slot, "rwkv7"):
            weight = slot.rwkv7.output.weight
            copy_into(weight, weight * (rms(torch.cat(record.outputs)) / max(rms(torch.cat(outputs)), 1e-12)))
