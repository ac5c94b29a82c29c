"""What a teacher's layers see and say on calibration tokens.

Legend: B batch, T time, D model width.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class LayerRecord:
    """Inputs x (after the layer's first norm) and outputs y (before its post-norm) of one attention, each a list of
    [B, T, D] blocks."""

    inputs: list[Tensor]
    outputs: list[Tensor]


@torch.no_grad()
def record_layers(
    teacher: PreTrainedModel, tokens: Iterable[tuple[Tensor, Tensor]], layers: Iterable[int]
) -> dict[int, LayerRecord]:
    """Run the teacher over blocks of (input_ids, position_ids), both [B, T], and record the attentions of `layers`."""
    records = {index: LayerRecord([], []) for index in layers}

    def keep(index: int) -> "torch.utils.hooks.RemovableHandle":
        def hook(
            module: nn.Module, arguments: tuple, options: dict, output: tuple[Tensor, Tensor | None]
        ) -> None:
            records[index].inputs.append(options["hidden_states"])
            records[index].outputs.append(output[0])

        return teacher.model.layers[index].self_attn.register_forward_hook(hook, with_kwargs=True)

    handles = [keep(index) for index in records]
    training = teacher.training
    teacher.eval()
    try:
        for input_ids, position_ids in tokens:
            teacher.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    finally:
        teacher.train(training)
        for handle in handles:
            handle.remove()
    return records
