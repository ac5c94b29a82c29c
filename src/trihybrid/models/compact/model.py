"""The compact hybrid: a front end, blocks of mixers, a tied and softcapped head.

    tokens -> Front -> x0 -> [Block] * L -> rms -> x E^T -> 30 tanh(. / 30)

Legend: B batch, T time, D model width, V vocabulary, G key/value heads, N head width, L layers.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from trihybrid.mixers.contract import Cost, Mixer, Projection, Shared, copy_into, linear
from trihybrid.mixers.front import Front, FrontOptions, FrontState
from trihybrid.mixers.span import Span, contiguous, packed
from trihybrid.mixers.state import State
from trihybrid.models.compact.block import EPSILON, Block
from trihybrid.models.compact.section import CompactSection
from trihybrid.ops.fake_quantize import check_clip, fake_quantize, integer_range
from trihybrid.ops.mixed_norm import scaled_norm
from trihybrid.ops.softcap import softcap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogitsOutput:
    """What `CompactModel.forward` returns: softcapped logits [B, T, V], float32."""

    logits: Tensor


@dataclass(frozen=True)
class CompactState:
    """What a compact model carries from token to token: the front end's state and those of each block's mixers."""

    front: FrontState
    blocks: tuple[tuple[State | None, ...], ...]
    start: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name, and `start` as int64, enough to restore the state to the bit."""
        named = {f"front.{name}": tensor for name, tensor in self.front.tensors().items()}
        for place, part in self._parts():
            named |= {f"{place}.{name}": tensor for name, tensor in part.tensors().items()}
        return named | {"start": torch.tensor(self.start)}

    def restore(self, tensors: dict[str, Tensor]) -> "CompactState":
        """The state whose `tensors` these are; `self` is any state of the same model, as `new_state` gives.

        Raises:
            ValueError: names of another model.
        """
        own = self.tensors()
        if set(tensors) != set(own):
            raise ValueError(
                f"the tensors of a state of this model differ from those given by {sorted(set(own) ^ set(tensors))}; "
                "restore with the model that saved them"
            )

        def below(place: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(f"{place}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{place}.")
            }

        blocks = tuple(
            tuple(
                None if part is None else type(part).restore(below(f"blocks.{layer}.{place}"))
                for place, part in enumerate(parts)
            )
            for layer, parts in enumerate(self.blocks)
        )
        return CompactState(FrontState.restore(below("front")), blocks, int(tensors["start"]))

    def _parts(self) -> Iterator[tuple[str, State]]:
        for layer, parts in enumerate(self.blocks):
            for place, part in enumerate(parts):
                if part is not None:
                    yield f"blocks.{layer}.{place}", part


class ValueEmbedding(nn.Module):
    """A second embedding of the tokens, added to the values of some layers: s_l P V[token], one factor a layer."""

    def __init__(self, section: CompactSection, vocabulary: int) -> None:
        super().__init__()
        self.layers = list(section.value_embedding_layers)
        self.groups = (section.kv_heads, section.head_dim)
        self.table = nn.Parameter(torch.empty(vocabulary, section.value_embedding_width))
        self.output = Projection(section.value_embedding_width, section.kv_heads * section.head_dim)
        self.scales = nn.Parameter(torch.empty(len(self.layers)))

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """Layer -> [B, T, G, N]."""
        rows_BTGN = self.output(embedding(tokens_BT, self.table).to(dtype)).unflatten(-1, self.groups)
        scales_L = self.scales.to(dtype)
        return {layer: scales_L[place] * rows_BTGN for place, layer in enumerate(self.layers)}


class Quantiser(nn.Module):
    """Fake quantisation that a tensor switches, so that a compiled graph obeys the switch."""

    def __init__(self, bits: int, clip: float | None, floor: float, device: torch.device) -> None:
        super().__init__()
        integer_range(bits)
        check_clip(clip)
        self.bits, self.clip, self.floor = bits, clip, floor
        self.active: Tensor
        self.register_buffer("active", torch.zeros((), device=device), persistent=False)
        self._on = False

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.bits, self.clip, self.active, self.floor)

    def switch(self, on: bool) -> None:
        """Set `active`, in place; a GPU hears of changes only."""
        if on != self._on:
            self._on = on
            self.active.fill_(float(on))


class CompactModel(nn.Module):
    """A causal language model of a `CompactSection`.

    Args:
        section: its shape.
        vocabulary: rows of embedding and head.

    Attributes:
        compute_dtype: dtype of the activations; None for that of the parameters.
    """

    def __init__(self, section: CompactSection, vocabulary: int) -> None:
        super().__init__()
        self.section, self.vocabulary = section, vocabulary
        self.compute_dtype: torch.dtype | None = None
        slots = section.slots()
        self.front = Front(
            FrontOptions(
                hidden_size=section.hidden_size,
                vocabulary=vocabulary,
                bigram_buckets=section.bigram_buckets,
                bigram_width=section.bigram_width,
                bigram_scale=section.bigram_scale,
                bigram_gain=(2 * len(slots)) ** -0.5,
                smear=section.smear,
                smear_start=section.smear_start,
                embedding_std=section.embedding_std,
            )
        )
        self.value_embedding = ValueEmbedding(section, vocabulary) if section.value_embedding_layers else None
        self.blocks = nn.ModuleList(Block(section, slot, index) for index, slot in enumerate(slots))
        ignored = [
            i for i in section.value_embedding_layers if not {"full", "sliding"} & set(slots[i].mixers)
        ]
        if ignored:
            logger.info("value_embedding_layers: %s have no attention; their factors stay unused", ignored)
        earlier = len(slots) // 2 if section.skips == "unet" else 0
        self.skip_scales = nn.Parameter(torch.empty(earlier, section.hidden_size)) if earlier else None

    def initialise(self) -> None:
        """Set every parameter from torch's generator: output matrices at zero, so that the first loss is that of the
        embedding alone."""
        self.front.initialise(copy_into)
        for index, block in enumerate(self._blocks()):
            block.initialise(index, len(self.blocks), copy_into)
        if self.value_embedding is not None:
            nn.init.normal_(self.value_embedding.table, std=0.02)
            nn.init.orthogonal_(self.value_embedding.output.weight)
            nn.init.constant_(self.value_embedding.scales, self.section.value_embedding_scale)
        if self.skip_scales is not None:
            nn.init.ones_(self.skip_scales)
        if self.section.matrix_init == "uniform":
            for projection in self.projections().values():
                if projection.weight.any():
                    bound = projection.in_features**-0.5
                    nn.init.uniform_(projection.weight, -bound, bound)

    def roles(self) -> dict[str, str]:
        """The role of every parameter; the embedding is the head too."""
        roles = {f"front.{name}": role for name, role in self.front.roles().items()}
        for index, block in enumerate(self._blocks()):
            roles |= {f"blocks.{index}.{name}": role for name, role in block.roles().items()}
        if self.value_embedding is not None:
            named = {"table": "embedding", "output.weight": "matrix", "scales": "vector"}
            roles |= {f"value_embedding.{name}": role for name, role in named.items()}
        return roles | ({} if self.skip_scales is None else {"skip_scales": "vector"})

    def projections(self) -> dict[str, Projection]:
        """Module name -> every matrix that multiplies activations; its parameter is `<name>.weight`."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Projection)}

    def hidden(
        self, tokens_BT: Tensor, span: Span, state: CompactState | None = None
    ) -> tuple[Tensor, CompactState]:
        """Normed rows that the head reads, [B, T, D] in the compute dtype, and the state after them.

        Raises:
            ValueError: `span.start` is not the number of tokens that the state holds.
        """
        held = 0 if state is None else state.start
        if span.start != held:
            raise ValueError(
                f"span.start is {span.start}; the state holds {held} tokens and must be continued there"
            )
        dtype = self.compute_dtype or self.front.tokens.dtype
        shared = Shared()
        x_BTD, front = self.front(tokens_BT, span, None if state is None else state.front, dtype)
        if self.value_embedding is not None:
            shared.value_embeddings = self.value_embedding(tokens_BT, dtype)
        first_BTD, half = x_BTD, len(self.blocks) // 2
        # The stream is x + branch; whoever reads it adds.
        branch_BTD: Tensor | None = None
        after: list[tuple[State | None, ...]] = []
        kept: list[Tensor] = []
        for index, block in enumerate(self._blocks()):
            if self.skip_scales is not None and index >= half and kept:
                x_BTD = _added(x_BTD, branch_BTD)
                branch_BTD = self.skip_scales[index - half].to(dtype) * kept.pop()
            before = [None] * len(block.mixers) if state is None else list(state.blocks[index])
            x_BTD, branch_BTD, mixed = block(x_BTD, branch_BTD, first_BTD, span, before, shared)
            after.append(tuple(mixed))
            if self.skip_scales is not None and index < half:
                x_BTD, branch_BTD = _added(x_BTD, branch_BTD), None
                kept.append(x_BTD)
        hidden_BTD = scaled_norm(_added(x_BTD, branch_BTD), 1.0, EPSILON)
        return hidden_BTD, CompactState(front, tuple(after), span.start + span.length)

    def logits(self, hidden: Tensor) -> Tensor:
        """Softcapped logits [..., V] in float32 (float64 for float64 rows)."""
        raw = linear(hidden, self.front.tokens)
        return softcap(raw if raw.dtype == torch.float64 else raw.float(), self.section.softcap)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, span: Span) -> Tensor:
        """Mean cross-entropy of the targets, nats a token; every target counts."""
        hidden_BTD, _ = self.hidden(tokens_BT, span)
        return cross_entropy(self.logits(hidden_BTD.flatten(0, 1)), targets_BT.flatten())

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False
    ) -> LogitsOutput:
        """Logits of a block that begins its documents; positions restart where a document begins."""
        if use_cache:
            raise ValueError("use_cache is True; a compact model's states go through `hidden`")
        batch, length = input_ids.shape
        span = (
            contiguous(batch, length, device=input_ids.device)
            if position_ids is None
            else packed(position_ids)
        )
        return LogitsOutput(self.logits(self.hidden(input_ids, span)[0]))

    def new_state(self, batch: int, device: torch.device | str) -> CompactState:
        """The state before the first token."""
        dtype = self.compute_dtype or self.front.tokens.dtype
        blocks = tuple(
            tuple(mixer.new_state(batch, device, dtype) for mixer in block.mixers)  # type: ignore[operator]
            for block in self._blocks()
        )
        return CompactState(self.front.new_state(batch, device, dtype), blocks)

    def enable_fake_quantise(self, bits: dict[str, int], clip: float | None, floor: float = 0.0) -> None:
        """Let the projections of the roles in `bits` see their weight through a quantiser, switched off at first. Call
        it once the model is on its device."""
        roles = self.roles()
        for name, projection in self.projections().items():
            width = bits.get(roles[f"{name}.weight"])
            if width is not None and width < 16:
                projection.quantiser = Quantiser(width, clip, floor, projection.weight.device)

    def set_quantisation(self, active: bool) -> None:
        """Switch the quantisers, in place: a compiled graph sees it."""
        for projection in self.projections().values():
            if isinstance(projection.quantiser, Quantiser):
                projection.quantiser.switch(active)

    def cost(self, context: int) -> Cost:
        """Cost of the token that follows `context - 1` others, head included; weights in 2 bytes, one row of each table
        but of the head's."""
        total = self.front.cost()
        weights = self.front.tokens.numel()
        products = weights
        for block in self._blocks():
            weights += sum(p.numel() for p in block.parameters())
            products += block.mlp.up.weight.numel() + block.mlp.down.weight.numel()
            for mixer in block.mixers:
                assert isinstance(mixer, Mixer)
                total += mixer.cost(context)
                weights -= sum(p.numel() for p in mixer.parameters())
        if self.value_embedding is not None:
            output = self.value_embedding.output.weight
            weights += output.numel() + output.shape[1] + self.value_embedding.scales.numel()
            products += output.numel()
        if self.skip_scales is not None:
            weights += self.skip_scales.numel()
        return total + Cost(2 * products, 0, 2 * weights)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]


def _added(x_BTD: Tensor, branch_BTD: Tensor | None) -> Tensor:
    return x_BTD if branch_BTD is None else x_BTD + branch_BTD
