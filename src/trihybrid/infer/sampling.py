"""How the next token is chosen: the settings of one sequence."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Settings of one sequence. The defaults take the likeliest token every time.

    Attributes:
        temperature: 0 takes the likeliest token; above it divides the logits.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the likeliest tokens whose probabilities first reach this sum, in (0, 1]; 1 for all.
        min_p: leave out tokens with less than this share of the likeliest one's probability, in [0, 1].
        repetition_penalty: logits of tokens that the sequence already holds are divided by it where positive and
            multiplied where negative (arXiv 1909.05858), > 0; 1 for none.
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
