"""Teacher and student over one copy of the frozen weights.

What is frozen is the same tensor for both, so the student's modules serve both streams; from the teacher stays only
what differs: its attention where the student has new mixers, and a twin of what trains.
Legend: B batch, T time, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trihybrid.distill.fuse import fuse
from trihybrid.distill.host_table import prepare
from trihybrid.distill.together import Together
from trihybrid.distill.trained import select
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.decoder.model import Stream
from trihybrid.models.decoder.sliding import linear_sliding
from trihybrid.ops.part import Part


class RecordingAttention(nn.Module):
    """The teacher's attention; with a `record` in its arguments it notes what went in and came out."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: Tensor,
        record: dict[str, Tensor] | None = None,
        **kwargs: Any,  # transformers' decoder layer passes masks, rotary tables and shared keys and values
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = self.attention(hidden_states=hidden_states, **kwargs)
        if record is not None:
            record["input"], record["output"] = hidden_states, output
        return output, weights


class Pair(nn.Module):
    """A student, and the teacher's layers where they differ from the student's.

    Args:
        student: what is trained.
        teacher: the model it was made from. It is taken apart: use it for nothing else afterwards.
        train: patterns (with *) of the student's parameter names that train; all others are frozen.
        part: which part of its rows this process has, where several share them.

    Raises:
        ValueError: patterns that match nothing; parts that may not train, or not in this dtype; a teacher whose
            retained tensors are not the student's.
    """

    def __init__(
        self,
        student: HybridForCausalLM,
        teacher: PreTrainedModel,
        train: Sequence[str],
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.part = part
        for model in (student, teacher):
            fuse(student, model)
            linear_sliding(model)
        self.student = student
        self.trained = select(student, train)
        slots = student.config.slot_list()
        self.converted = [index for index, slot in enumerate(slots) if slot.converted]
        self.teacher_layers = nn.ModuleDict()
        for index, layer in enumerate(teacher.model.layers):
            prefix, owner = f"model.layers.{index}.", student.model.layers[index]
            for name, buffer in layer.named_buffers(recurse=False):
                _check_tensor(buffer, getattr(owner, name), prefix + name)
            # A full layer that became a sliding one is the same module: what differs is what it may see.
            if _borrow(layer, owner, prefix, self.trained) or slots[index].window:
                if index in self.converted:
                    layer.self_attn = RecordingAttention(layer.self_attn)
                self.teacher_layers[str(index)] = layer
        for name, module in teacher.model.named_children():
            if name != "layers":
                _check_equal(module, getattr(student.model, name), f"model.{name}.")
        if not student.config.tie_word_embeddings:
            _check_equal(teacher.lm_head, student.lm_head, "lm_head.")
        self.teacher_layers.requires_grad_(False)

    def prepare(
        self, input_ids: Tensor, position_ids: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Stream]:
        """Hidden states [B, T, D] and the stream with what the layers of both need; without gradient. `rows` are those
        of tables on the host."""
        model = self.student.model
        types = {attention.layer_type for attention in model.anatomy.attentions}
        with torch.no_grad():
            return prepare(model, input_ids, position_ids, rows, types, self.part)

    @torch.no_grad()
    def teacher_layer(
        self, index: int, hidden_BTD: Tensor, stream: Stream, record: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The teacher's layer on the teacher's stream; `record` receives input and output of a converted attention."""
        model = self.student.model
        layer = dict(self.teacher_layers.items()).get(str(index), model.layers[index])
        return model.layer(index, hidden_BTD, stream, layer, record)

    def together(self) -> nn.ModuleList:
        """The layers as units that hold the weights of both streams."""
        layers = self.student.model.layers
        own = dict(self.teacher_layers.items())
        return nn.ModuleList(
            Together(layer, *filter(None, [own.get(str(index))])) for index, layer in enumerate(layers)
        )

    @property
    def first_difference(self) -> int:
        """The first layer at which student and teacher part: all below is computed once."""
        return min(int(index) for index in self.teacher_layers)


def _borrow(layer: nn.Module, owner: nn.Module, prefix: str, trained: dict[str, nn.Parameter]) -> bool:
    """Put the owner's frozen modules in the place of the layer's own; whether anything of its own is left."""
    kept = False
    for name, module in list(layer.named_children()):
        other = getattr(owner, name)
        inside = f"{prefix}{name}."
        if (
            any(n.startswith(inside) for n in trained)
            and list(module.children())
            and type(module) is type(other)
        ):
            _borrow(module, other, inside, trained)
            kept = True
        elif any(n.startswith(inside) for n in trained) or not isinstance(other, type(module)):
            kept = True
        else:
            _check_equal(module, other, inside)
            setattr(layer, name, other)
    return kept


def _check_equal(module: nn.Module, other: nn.Module, prefix: str) -> None:
    owned = dict(other.named_parameters())
    for name, tensor in module.named_parameters():
        _check_tensor(tensor, owned.get(name), prefix + name)


def _check_tensor(tensor: Tensor, match: Tensor | None, name: str) -> None:
    if match is not None and match.dtype != tensor.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} in the teacher, {match.dtype} in the student; load both in one dtype"
        )
    if match is None or not torch.equal(match, tensor):
        raise ValueError(
            f"{name}: the teacher's tensor is not the student's; this is not the student's teacher"
        )
