"""A stream of tokens in memory, a table of bytes, a small compact model and a recurrent stand-in for one."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trihybrid.mixers.span import Span
from trihybrid.models.compact import CompactModel, CompactSection

VOCABULARY, BOS = 11, 1


class MemoryShards:
    """What scoring needs of `TokenShards`."""

    folder, bos_id, vocab_size = "memory", BOS, VOCABULARY

    def __init__(self, tokens: list[int], text_bytes: int = 100) -> None:
        self.stream, self.text_bytes = np.array(tokens, dtype=np.uint16), text_bytes

    def __len__(self) -> int:
        return len(self.stream)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self.stream[start:stop].copy()


class FixedTable:
    """Token t stands for t bytes, one less after token 2; BOS for none."""

    def count(self, targets_N: np.ndarray, previous_N: np.ndarray) -> int:
        assert targets_N.dtype == previous_N.dtype == np.int64
        text = targets_N != BOS
        return int(targets_N[text].sum() - (text & (previous_N == 2)).sum())


def random_stream(tokens: int, seed: int, documents: int = 4) -> list[int]:
    """A BOS, a 3, then ids 2..10 with about `documents` BOS in all."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(2, VOCABULARY, (tokens,), generator=generator)
    stream[torch.randint(0, tokens, (documents - 1,), generator=generator)] = BOS
    stream[0], stream[1] = BOS, 3
    return stream.tolist()


@dataclass(frozen=True)
class SumState:
    sum_BD: Tensor


class RunningMean(nn.Module):
    """Hidden = tanh of the mean of the document's embeddings so far, beside the token's own; float64.

    peek: adds this much of the mean over all tokens of the row, later ones too.
    """

    def __init__(self, seed: int = 0, peek: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vocabulary, self.peek, self.calls = VOCABULARY, peek, 0
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(VOCABULARY, 12, generator=generator, dtype=torch.float64))

    def hidden(
        self, tokens_BT: Tensor, span: Span, states: list[SumState] | None = None
    ) -> tuple[Tensor, list[SumState]]:
        assert not self.training
        assert span.positions_BT.shape == tokens_BT.shape
        assert span.borders or span.start == 0 or states is not None
        self.calls += 1
        x_BTD = self.embedding[tokens_BT]
        total_BD = states[0].sum_BD if states is not None else torch.zeros_like(x_BTD[:, 0])
        means = []
        for time in range(span.length):
            if span.borders:
                total_BD = total_BD * (span.positions_BT[:, time, None] != 0)
            total_BD = total_BD + x_BTD[:, time]
            means.append(total_BD / (span.positions_BT[:, time, None] + 1))
        mean_BTD = torch.stack(means, 1) + self.peek * x_BTD.mean(1, keepdim=True)
        return torch.cat([mean_BTD.tanh(), x_BTD], -1), [SumState(total_BD)]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head.T

    def nats(self, document: list[int]) -> list[float]:
        """-log p of every token of a document after its first, by one forward."""
        tokens_1T = torch.tensor([document])
        with torch.no_grad():
            x_TD = self.embedding[tokens_1T[0, :-1]]
            count_T1 = torch.arange(1, len(document))[:, None]
            hidden_TD = torch.cat([(x_TD.cumsum(0) / count_T1).tanh(), x_TD], -1)
            log_p_TV = torch.log_softmax(self.logits(hidden_TD), -1)
        return (-log_p_TV.gather(1, tokens_1T[0, 1:, None])[:, 0]).tolist()


def compact(dtype: torch.dtype, pattern: str = "TWXRF", seed: int = 0) -> CompactModel:
    """Every mixer and the whole front end, all parameters random so that no part puts out zero; bfloat16 is the compute
    dtype of float32 parameters."""
    section = CompactSection(
        hidden_size=16,
        pattern=pattern,
        legend={
            "T": "token_shift",
            "W": {"mixer": "sliding", "window": 3},
            "X": {"mixer": "sliding", "window": 5, "xsa": True},
            "R": ["rwkv7", "tica"],
            "F": {"mixer": "full", "xsa": True},
        },
        heads=2,
        kv_heads=1,
        head_dim=8,
        rope_dims=4,
        bigram_buckets=8,
        bigram_width=4,
        value_embedding_width=4,
        value_embedding_layers=[4],
        rwkv7={"heads": 2, "kv_heads": 1, "head_dim": 8, "decay_rank": 4, "iclr_rank": 4, "gate_rank": 4},
        tica={"heads": 2, "kv_heads": 1, "head_dim": 8, "gate_rank": 4},
    )
    model = CompactModel(section, VOCABULARY).to(torch.promote_types(dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.4
    model.compute_dtype = dtype
    return model
