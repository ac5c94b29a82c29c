"""The whole forward pass: chunks of prompts, and one token of each of several sequences.

The layers above the last one that stores anything are read by nobody but the head. A chunk leaves them out, and the
last token of a prompt alone passes them, in a step of `decode`: Gemma 4's fast prefill, in teachers and in students
whose plan keeps it.

Legend: B sequences, T tokens, D model width, V vocabulary, M pages in a table.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trihybrid.infer.network.attention import RetainedAttention, Store
from trihybrid.infer.network.inputs import PerLayerInputs
from trihybrid.infer.network.layer import Layer, Mix
from trihybrid.infer.network.mixers import SlotMixers
from trihybrid.infer.network.parts import Fusion, Norm, Rotary
from trihybrid.infer.network.places import Chunk, Place, Turn
from trihybrid.infer.states import States, StateShape
from trihybrid.infer.weights import Weights, quantise, tensor_bytes
from trihybrid.mixers.contract import Mixer
from trihybrid.models.anatomy import anatomy
from trihybrid.models.decoder.config import media_tokens
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.pattern import Slot
from trihybrid.ops.softcap import softcap

PLAIN = Fusion()


class Network:
    """A teacher or a student.

    Args:
        model: it; parameters of our mixers that are wider than the rest are cast to the model's dtype, as each forward
            pass would, once.
        rows, length, tokens: of its states (`States`).
        weights: how linear maps are kept, see `quantise`.

    Attributes:
        states: what the sequences carry.
        media: id -> name of tokens that are no text.
        positions: max_position_embeddings; None where the configuration has none.
        below: layers that every token of a prompt passes; the others store nothing.
        fast_prefill: whether there are others.
        model, decoder, body: the model, its text decoder, and the family's anatomy.
        layers, norm, per_layer: our form of the layers, of the last norm, and of per-layer inputs where there are any.

    Raises:
        ValueError: a model type that `models.anatomy` does not know, or rotations that depend on the length.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, length: int, tokens: int = 0, weights: Weights = "full"
    ) -> None:
        self.model: Any = model
        self.decoder: Any = model.model
        student = isinstance(model, HybridForCausalLM)
        self.body = anatomy(self.decoder.base if student else model.config)
        self._nope = student and model.config.nope
        self._slots = model.config.slot_list() if student else [Slot((kind,)) for kind in self.body.kinds]
        self.device, self.dtype = model.device, self.decoder.embed_tokens.weight.dtype
        self.media = media_tokens(model.config)
        self.positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self.vocabulary: int = self.decoder.embed_tokens.weight.shape[0]
        if student:
            _narrow(self.decoder, self.dtype)
        quantise(self.decoder.layers, weights)
        self.states = States(self._shapes(), rows, length, self.dtype, self.device, tokens)
        storing = [shape.layer for shape in self.states.shapes]
        self.below = max(storing) + 1
        self.fast_prefill = self.below < len(self._slots)
        self.norm = Norm(self.decoder.norm, self.body.norm == "one_plus_weight")
        self.per_layer = None
        if getattr(self.decoder, "hidden_size_per_layer_input", 0):
            self.per_layer = PerLayerInputs(self.decoder)
        rotary = {
            attention.layer_type: Rotary(self.decoder.rotary_emb, attention.layer_type)
            for attention, slot in zip(self.body.attentions, self._slots, strict=True)
            if not slot.converted and not self._nope
        }
        activations: dict[type, Any] = {}
        self.layers = [
            Layer(module, self._mix(index, module.self_attn, rotary), self.body, activations)
            for index, module in enumerate(self.decoder.layers)
        ]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers, each once."""
        seen = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor_bytes(t) for t in seen.values())

    @property
    def has_experts(self) -> bool:
        """Whether tokens choose experts, whose shapes depend on the choice."""
        return self.body.experts is not None

    def prefill(
        self, tokens: list[int], row: int, start: int, pages: list[int], logits: bool
    ) -> Tensor | None:
        """Work on `tokens` of a sequence, the next after the `start` that its row and pages have seen.

        Args:
            pages: enough for all its tokens up to the end of these.
            logits: whether those behind the last token are wanted. With `fast_prefill` they are not to be had: leave
                that token to `decode`.

        Returns:
            logits [V], float32 (float64 in a float64 model), or None.
        """
        assert not (logits and self.fast_prefill)
        ids_BT = torch.tensor([tokens], dtype=torch.int64, device=self.device)
        chunk = Chunk(row, start, len(tokens), pages, self.states.length, self.device)
        x_BTD = self._run(ids_BT, chunk, self.below)
        return self._head(x_BTD[:, -1:])[0] if logits else None

    def decode(self, ids_B: Tensor, positions_B: Tensor, table_BM: Tensor, fusion: Fusion = PLAIN) -> Tensor:
        """Let the sequences in rows 0 to B - 1 read one token each: a function of tensors, to be recorded.

        Args:
            ids_B: int64, the tokens.
            positions_B: int64, how many tokens each sequence has seen.
            table_BM: int64, their pages in order; entries behind their length name any page.
            fusion: what stands between the matrix products.

        Returns:
            logits [B, V], float32 (float64 in a float64 model).
        """
        turn = Turn(positions_B[:, None], table_BM, self.states.length, fusion)
        return self._head(self._run(ids_B[:, None], turn, len(self.layers)))

    def _run(self, ids_BT: Tensor, place: Place, count: int) -> Tensor:
        """The stream behind the first `count` layers."""
        x_BTD = self.decoder.embed_tokens(ids_BT)
        inputs: list[Tensor] | list[None] = [None] * count
        if self.per_layer is not None:
            inputs = self.per_layer(ids_BT, x_BTD, count)
        for layer, input_BTP in zip(self.layers[:count], inputs, strict=True):
            x_BTD = layer(x_BTD, place, input_BTP)
        return x_BTD

    def _head(self, x_B1D: Tensor) -> Tensor:
        raw_BV = self.model.lm_head(self.norm(x_B1D))[:, 0]
        return softcap(raw_BV if raw_BV.dtype == torch.float64 else raw_BV.float(), self.body.softcap)

    def _shapes(self) -> list[StateShape]:
        shapes = []
        for index, (slot, attention) in enumerate(zip(self._slots, self.body.attentions, strict=True)):
            if not slot.converted and attention.owner == index:
                sizes = attention.kv_heads, attention.head_dim
                if slot.mixers == ("sliding",):
                    window = slot.window or self.body.window
                    assert window is not None
                    shapes.append(StateShape(index, "ring", *sizes, window))
                else:
                    shapes.append(StateShape(index, "pages", *sizes))
            if "rwkv7" in slot.mixers:
                options = self.model.config.rwkv7_options()
                shapes.append(StateShape(index, "matrix", options.heads, options.head_dim))
            if "tica" in slot.mixers and "tica" not in slot.donors:
                tica = self.model.config.tica_options()
                shapes.append(StateShape(index, "pages", tica.kv_heads, tica.head_dim))
        return shapes

    def _mix(self, index: int, module: Any, rotary: dict[str, Rotary]) -> Mix:
        slot, attention = self._slots[index], self.body.attentions[index]
        if not slot.converted:
            ring = slot.mixers == ("sliding",)
            stored = (self.states.rings if ring else self.states.pages)[attention.owner]
            store = Store(stored, ring, attention.owner == index)
            turning = None if self._nope else rotary[attention.layer_type]
            return RetainedAttention(module, attention, self.body, store, turning)
        tica = getattr(module, "tica", None)
        shared: Store | None = None
        if tica is not None:
            donor = slot.donors.get("tica", index)
            shared = Store(self.states.pages[donor], ring=False, own=donor == index)
        return SlotMixers(getattr(module, "rwkv7", None), self.states.matrices.get(index), tica, shared)


def _narrow(decoder: Any, dtype: torch.dtype) -> None:
    """Cast matrices of our mixers that are float32 masters to the model's dtype, as every forward pass would."""
    for module in decoder.modules():
        if isinstance(module, Mixer):
            for parameter in module.parameters():
                if parameter.dim() == 2 and parameter.dtype.itemsize > dtype.itemsize:
                    parameter.data = parameter.data.to(dtype)
