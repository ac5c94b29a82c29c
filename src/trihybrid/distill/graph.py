"""Stage 2 as one CUDA graph: layers, divergence and gradients of both streams are recorded once and then replayed.

At some thousand tokens a step is three thousand small kernels, and to ask for them takes longer than they do. What
waits for the GPU, or depends on where documents end, is done before: embeddings, masks, rotary tables. These go into
the recording as tensors of fixed sizes.

Legend: B batch, T tokens, D model width, N documents.
"""

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Shared
from trihybrid.models.decoder.model import Stream
from trihybrid.models.decoder.sliding import Mask, Window
from trihybrid.ops.sliding_attention import Documents
from trihybrid.train.graph import GraphedGradients

FEWEST = 64
"""Documents of a recording, with empty ones where there are fewer."""


class Losses(Protocol):
    """What is recorded: a loss and its parts from what `prepare` made, without waiting for the device."""

    def prepare(
        self, input_ids: Tensor, position_ids: Tensor, rows: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Stream]:
        """Hidden states [B, T, D] and all that the layers read beside them."""
        ...

    def losses(self, hidden_BTD: Tensor, stream: Stream) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts, scalars."""
        ...


class Graphed:
    """Loss and gradients by a recording, which is made anew when batches of documents come after some without borders,
    or when they hold many more.

    While it is made, no other gradient graph over the parameters may be alive: its nodes belong to another stream.

    Args:
        module: computes the losses.
        parameters: those that train.
    """

    def __init__(self, module: Losses, parameters: list[nn.Parameter]) -> None:
        self._module, self._parameters = module, parameters
        self._borders, self._documents = False, FEWEST
        self._recorded: dict[tuple, tuple[GraphedGradients, dict[str, Tensor]]] = {}

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        share: float,
        rows: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add `share` times the gradient to the parameters' gradients; the loss and its parts, without gradients."""
        hidden_BTD, stream = self._module.prepare(input_ids, position_ids, rows)
        tensors, stream = self.take_apart(hidden_BTD, stream)
        form = (share, *((name, tuple(x.shape)) for name, x in tensors.items()))
        if form not in self._recorded:
            # A recording holds its memory: that of batches of another form is given back first.
            self._recorded = {key: value for key, value in self._recorded.items() if key[1:] == form[1:]}
            parts: dict[str, Tensor] = {}
            function = self.function(list(tensors), stream, parts)
            self._recorded[form] = GraphedGradients(function, self._parameters, share), parts
        graph, parts = self._recorded[form]
        loss = graph(*tensors.values())
        return loss, {name: value.clone() for name, value in parts.items()}

    def take_apart(self, hidden_BTD: Tensor, stream: Stream) -> tuple[dict[str, Tensor], Stream]:
        """The tensors of a stream by name, and the stream that they were taken from, with borders if some batch had
        some."""
        self._borders |= stream.span.borders
        stream = _with_borders(stream) if self._borders else stream
        tensors = {"hidden": hidden_BTD, "positions": stream.span.positions_BT, "ids": stream.position_ids}
        if stream.per_layer_BTLP is not None:
            tensors["per layer"] = stream.per_layer_BTLP
        for kind, (cosine, sine) in stream.rotary.items():
            tensors[f"cosine {kind}"], tensors[f"sine {kind}"] = cosine, sine
        for kind, mask in stream.masks.items():
            if isinstance(mask, Window):
                starts_N, _ = mask.documents.packing
                if self._borders:
                    starts_N = mask.documents.padded(self._documents)
                    self._documents = len(starts_N)
                tensors["starts"] = starts_N
            elif isinstance(mask, Tensor):
                tensors[f"mask {kind}"] = mask
            elif mask is not None:
                raise ValueError(
                    f"graph: the mask of {kind} is a {type(mask).__name__}; load the models with "
                    'attn_implementation="sdpa", or set graph to false'
                )
        return tensors, stream

    def function(self, names: list[str], stream: Stream, parts: dict[str, Tensor]) -> Callable[..., Tensor]:
        """The loss as a function of the tensors alone; it leaves its parts in `parts`, always in the same places."""

        stream = replace(stream, per_layer_BTLP=None)

        def loss(*given: Tensor) -> Tensor:
            tensors = dict(zip(names, given, strict=True))
            loss, found = self._module.losses(tensors["hidden"], _put_together(tensors, stream))
            for name, value in ((name, value.detach()) for name, value in found.items()):
                if name not in parts:
                    parts[name] = torch.zeros_like(value)
                parts[name].copy_(value)
            return loss

        return loss


def _with_borders(stream: Stream) -> Stream:
    """The same stream in the form that rows of several documents have."""
    if stream.span.borders:
        return stream
    span = replace(stream.span, borders=True)
    visible_BTS = span.visible(span.length)
    assert visible_BTS is not None
    documents = Documents(span.positions_BT, borders=True)
    masks: dict[str, Mask] = {
        kind: replace(mask, documents=documents) if isinstance(mask, Window) else visible_BTS[:, None]
        for kind, mask in stream.masks.items()
    }
    return replace(stream, span=span, masks=masks)


def _put_together(tensors: dict[str, Tensor], stream: Stream) -> Stream:
    """`stream` with other tensors, and empty records of what is shared."""
    span = replace(stream.span, positions_BT=tensors["positions"])
    masks: dict[str, Mask] = {}
    for kind, mask in stream.masks.items():
        if isinstance(mask, Window):
            # No document is longer than its row.
            packing = tensors["starts"], span.length
            mask = replace(mask, documents=Documents(span.positions_BT, span.borders, packing))
        masks[kind] = tensors.get(f"mask {kind}", mask)
    return replace(
        stream,
        span=span,
        masks=masks,
        rotary={kind: (tensors[f"cosine {kind}"], tensors[f"sine {kind}"]) for kind in stream.rotary},
        position_ids=tensors["ids"],
        per_layer_BTLP=tensors.get("per layer"),
        shared=Shared(),
        shared_attention=UserDict(),
    )
