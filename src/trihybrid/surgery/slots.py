"""Building the converted slots of a student, one after the other, from what its teacher's attentions are made of.

A slot starts from a seed of its own, takes what it can from the teacher's tensors, and is scaled. Whether those tensors
lie in memory or on the disk, and whether the student is a model or a file, is not known here.

Legend: B batch, T time, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.span import packed
from trihybrid.mixers.tica import Tica
from trihybrid.models.anatomy import anatomy
from trihybrid.models.decoder.config import HybridConfig
from trihybrid.models.decoder.slot import ConvertedSlot
from trihybrid.models.drawing import drawing, one_thread
from trihybrid.models.inventory import empty_teacher
from trihybrid.models.shapes import TeacherConfig
from trihybrid.models.teacher.source import TensorSource
from trihybrid.models.teacher.streamed import streamed_model
from trihybrid.surgery.calibrate import LayerRecord, noise, noise_record, record_layers, rows
from trihybrid.surgery.inherit import rms
from trihybrid.surgery.layout import settle, student_config, student_heads
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.transplant import (
    RWKV7_INHERITED,
    TICA_INHERITED,
    fit_keys_values,
    inherit_rwkv7,
    inherit_tica,
)
from trihybrid.surgery.weights import LayerWeights, read_layer

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
    base: TeacherConfig,
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
    section = settle(base, section)
    _check_tokens(section, tokens)
    config = student_config(base, section)
    converted = [i for i, slot in enumerate(config.slot_list()) if slot.converted]
    builder = _Builder(source, base, section, config, seed)
    if tokens and converted:
        wanted = sorted({anatomy(base).owners[index] for index in converted} | set(converted))
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
    base: TeacherConfig
    section: SurgerySection
    config: HybridConfig
    seed: int
    records: dict[int, LayerRecord] = field(default_factory=dict)
    positions: list[Tensor] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept = self.source.read("model.norm.weight")
        # Scales are fitted before anything is rounded to the teacher's dtype.
        self.dtype = torch.promote_types(kept.dtype, torch.float32)
        self.body, self.empty = anatomy(self.base), empty_teacher(self.base)
        self.heads = student_heads(self.base, self.section)
        self.u_1TD = noise(
            self.base.hidden_size, self.seed, torch.empty(0, dtype=self.dtype, device=kept.device)
        )
        self.positions = [torch.arange(self.u_1TD.shape[1], device=kept.device)[None]]

    def build(self, index: int) -> BuiltSlot:
        layer = read_layer(self.source, self.empty, self.body, index, self.dtype)
        record, owner = self._record(index, layer), self.body.owners[index]
        x_ND, fitted = rows(record.inputs), layer.attention
        if owner != index and self.section.donor_keys_values == "ridge":
            fitted = fit_keys_values(fitted, x_ND, rows(self.records[owner].inputs), self.section.ridge)
        slot = self._drawn(index)
        inherited = set()
        for mixer in slot.mixers():
            if isinstance(mixer, Rwkv7):
                inherit_rwkv7(mixer, fitted, self.body, self.heads, x_ND)
                inherited |= {f"rwkv7.{name}" for name in RWKV7_INHERITED}
            elif isinstance(mixer, Tica) and self.section.tica.start == "inherited":
                inherit_tica(mixer, layer.attention, self.heads)
                inherited |= {f"tica.{name}" for name in TICA_INHERITED}
        self._scale(slot, record)
        found = frozenset(inherited & {name for name, _ in slot.named_parameters()})
        return BuiltSlot(index, slot, found, layer.names if found else frozenset())

    def _record(self, index: int, layer: LayerWeights) -> LayerRecord:
        if self.records:
            return self.records[index]
        return noise_record(self.u_1TD, layer, self.heads, self.body.value_norm, self.base.rms_norm_eps)

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
            weight, bias = slot.rwkv7.output.weight, slot.rwkv7.output.bias
            # A bias is the teacher's own and right as it is.
            theirs, ours = (rows(y) if bias is None else rows(y) - bias for y in (record.outputs, outputs))
            copy_into(weight, weight * (rms(theirs) / max(rms(ours), 1e-12)))
