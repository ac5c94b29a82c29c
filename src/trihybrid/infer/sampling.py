"""How the next token is chosen: the settings of one sequence, and the choice.

    z = logits, penalised;  z <- z / temperature
    kept = top_k likeliest of all, then those before whose turn the probabilities have not reached top_p, then those
           with at least min_p of the likeliest one's probability
    token = the first kept one, in the order of the vocabulary, at which the sum of probabilities passes u

u in [0, 1) is a hash of the seed and of the place in the sequence, so a choice depends on nothing else: not on the
device, nor on what other sequences do. Sources: top-p arXiv 1904.09751, min-p arXiv 2407.01082. Legend: V vocabulary.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of one sequence. The defaults take the likeliest token every time.

    Attributes:
        temperature: 0 takes the likeliest token; above it divides the logits.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens whose probabilities first reach this sum, in (0, 1]; 1 for all.
        min_p: leave out tokens with less than this share of the likeliest one's probability, in [0, 1].
        repetition_penalty: logits of tokens that the sequence already holds are divided by it where positive and
            multiplied where negative (arXiv 1909.05858), in 0.01 to 100; 1 for none.
        seed: of the draws, in 0 to 2**63 - 1. A draw depends on the seed and on the place in the sequence alone.

    Raises:
        ValueError: a setting out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (likeliest token) or a finite number above"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all tokens) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and be at most 1 (all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must lie in 0 (all tokens) to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must lie in 0.01 to 100, 1 for none"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in 0 to 2**63 - 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token of the raw logits is taken."""
        return self.temperature == 0 and self.repetition_penalty == 1


GREEDY = Sampling()


def choose(logits_V: Tensor, sampling: Sampling, held: Sequence[int]) -> int:
    """The next token of a sequence that holds the tokens `held`. ValueError where logits to draw from are NaN."""
    if sampling.repetition_penalty != 1:
        logits_V = _penalised(logits_V, sampling.repetition_penalty, held)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # The likeliest one becomes 0 first: then no temperature is too small.
    logits_V = logits_V.double()
    weights_V = ((logits_V - logits_V.max()) / sampling.temperature).exp()
    kept_V = weights_V >= sampling.min_p
    if 0 < sampling.top_k < len(weights_V) or sampling.top_p < 1:
        kept_V &= _likeliest(weights_V, sampling.top_k, sampling.top_p)
    sums_V = torch.where(kept_V, weights_V, 0.0).cumsum(0)
    # `right`: at a sum that equals the draw the token has been passed, so that one of weight zero is never taken.
    place = torch.searchsorted(sums_V, _draw(sampling.seed, len(held)) * sums_V[-1:], right=True)
    kept = kept_V.nonzero()
    if not len(kept):
        raise ValueError("the model's logits are NaN: its weights or its state are damaged")
    return min(int(place), int(kept[-1]))


def _penalised(logits_V: Tensor, penalty: float, held: Sequence[int]) -> Tensor:
    tokens = torch.tensor(sorted(set(held)), dtype=torch.int64, device=logits_V.device)
    values = logits_V[tokens]
    return logits_V.index_put((tokens,), torch.where(values > 0, values / penalty, values * penalty))


def _likeliest(weights_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens are among the `top_k` likeliest and needed to reach `top_p` of those."""
    count = top_k if 0 < top_k < len(weights_V) else len(weights_V)
    best, tokens = weights_V.topk(count)
    before = best.cumsum(0) - best
    kept_V = torch.zeros_like(weights_V, dtype=torch.bool)
    kept_V[tokens[before < top_p * best.sum()]] = True
    return kept_V


def _draw(seed: int, place: int) -> float:
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + place.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
