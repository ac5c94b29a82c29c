"""The embedding front end: token embedding, BigramHash, SmearGate. It looks one token back, so it has a state and obeys
the mixers' laws.

Equations: PR 1007 of openai/parameter-golf.

    e_t = E[token_t] + c P H[h_t]       h_t = (36313 token_t XOR 27191 token_{t-1}) mod (buckets - 1), and the last
                                        bucket at the first token of a document (BigramHash)
    x_t = rms(e_t)
    x_t <- (1 - g) x_t + g x_{t-1}      g = s(gate), s the logistic function, x_{t-1} = 0 before a document (SmearGate)

Legend: B batch, T time, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm

from trihybrid.mixers.contract import Cost, Projection, Write
from trihybrid.mixers.span import Span
from trihybrid.ops.token_shift import last_tokens, token_shift

EPSILON = 1e-6


@dataclass(frozen=True)
class FrontOptions:
    """Sizes and parts.

    Attributes:
        bigram_buckets: rows of the hash table, at least 2; 0 leaves BigramHash out.
        bigram_width: its columns.
        bigram_scale: initial factor c.
        bigram_gain: gain of the orthogonal start of P.
        smear: whether there is a SmearGate, and `smear_start` its gate before the logistic function.
        embedding_std: of the normal start of E.
    """

    hidden_size: int
    vocabulary: int
    bigram_buckets: int = 2048
    bigram_width: int = 128
    bigram_scale: float = 0.05
    bigram_gain: float = 1.0
    smear: bool = True
    smear_start: float = 0.0
    embedding_std: float = 0.005

    def __post_init__(self) -> None:
        if self.bigram_buckets == 1 or self.bigram_buckets < 0:
            raise ValueError(
                f"front.bigram_buckets is {self.bigram_buckets}; it must be 0 (none) or at least 2: one is kept "
                "for the first token of a document"
            )


@dataclass(frozen=True)
class FrontState:
    """The last token id, int64 [B, 1], and its row before the SmearGate, [B, 1, D]."""

    token_B1: Tensor
    row_B1D: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"token": self.token_B1, "row": self.row_B1D}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Self:
        return cls(tensors["token"], tensors["row"])


class Front(nn.Module):
    """From token ids to the first rows of the residual stream."""

    def __init__(self, options: FrontOptions) -> None:
        super().__init__()
        self.options = options
        self.tokens = nn.Parameter(torch.empty(options.vocabulary, options.hidden_size))
        if options.bigram_buckets:
            self.bigrams = nn.Parameter(torch.empty(options.bigram_buckets, options.bigram_width))
            self.bigram_output = Projection(options.bigram_width, options.hidden_size)
            self.bigram_scale = nn.Parameter(torch.empty(()))
        if options.smear:
            self.gate_D = nn.Parameter(torch.empty(options.hidden_size))

    def forward(
        self, tokens_BT: Tensor, span: Span, state: FrontState | None, dtype: torch.dtype
    ) -> tuple[Tensor, FrontState]:
        """Rows [B, T, D] in `dtype` of int64 ids [B, T], and the state after them."""
        x_BTD = embedding(tokens_BT, self.tokens).to(dtype)
        if self.options.bigram_buckets:
            bigram_BTE = embedding(self._buckets(tokens_BT, span, state), self.bigrams).to(dtype)
            x_BTD = x_BTD + self.bigram_scale.to(dtype) * self.bigram_output(bigram_BTE)
        x_BTD = rms_norm(x_BTD, (x_BTD.shape[-1],), eps=EPSILON)
        before_B1D = None if state is None else state.row_B1D
        after = FrontState(tokens_BT[:, -1:], last_tokens(x_BTD, before_B1D, 1))
        if self.options.smear:
            gate_D = torch.sigmoid(self.gate_D).to(dtype)
            x_BTD = torch.lerp(x_BTD, token_shift(x_BTD, before_B1D, span.positions_BT), gate_D)
        return x_BTD, after

    def _buckets(self, tokens_BT: Tensor, span: Span, state: FrontState | None) -> Tensor:
        before_B1 = torch.zeros_like(tokens_BT[:, :1]) if state is None else state.token_B1
        previous_BT = torch.cat([before_B1, tokens_BT[:, :-1]], 1)
        last = self.options.bigram_buckets - 1
        hashed_BT = ((36313 * tokens_BT) ^ (27191 * previous_BT)) % last
        return torch.where(span.positions_BT == 0, last, hashed_BT)

    def initialise(self, write: Write) -> None:
        """Normal embeddings, a hash table of zero behind an orthogonal projection, the options' scale and gate."""
        options = self.options
        write(self.tokens, nn.init.normal_(torch.empty(self.tokens.shape), std=options.embedding_std))
        if options.bigram_buckets:
            write(self.bigrams, torch.zeros(self.bigrams.shape))
            shape = self.bigram_output.weight.shape
            write(
                self.bigram_output.weight, nn.init.orthogonal_(torch.empty(shape), gain=options.bigram_gain)
            )
            write(self.bigram_scale, torch.tensor(options.bigram_scale))
        if options.smear:
            write(self.gate_D, torch.full(self.gate_D.shape, options.smear_start))

    def roles(self) -> dict[str, str]:
        """Parameter name -> role. The embedding is the head too."""
        known = {"tokens": "embedding", "bigrams": "embedding", "bigram_output.weight": "matrix"}
        return {name: known.get(name, "vector") for name, _ in self.named_parameters()}

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> FrontState:
        """The state before the first token."""
        row_B1D = torch.zeros(batch, 1, self.options.hidden_size, device=device, dtype=dtype)
        return FrontState(torch.zeros(batch, 1, dtype=torch.int64, device=device), row_B1D)

    def cost(self) -> Cost:
        """Cost of one token, the same at every context: it reads a row of each table."""
        options = self.options
        weights = options.hidden_size * (1 + options.smear)
        products = 0
        if options.bigram_buckets:
            products = self.bigram_output.weight.numel()
            weights += options.bigram_width + products + 1
        stored = 8 + 2 * options.hidden_size
        return Cost(2 * products, stored, 2 * weights + stored)
