"""Continuing a text with a compact model: the prompt in one block, then token by token from the model's state.

Legend: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.section import check_sampling
from trihybrid.mixers.span import contiguous
from trihybrid.models.compact.model import CompactModel


def sample(
    model: CompactModel,
    tokenizer: TextTokenizer,
    prompt: str,
    tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The continuation of `prompt`, without the prompt; it ends early where the model begins a new document.

    Args:
        model: the model, on any device; its parameters decide the dtype.
        tokenizer: the model's.
        prompt: any text; a beginning-of-sequence token goes before it.
        tokens: at most this many new ones, >= 1.
        temperature: 0 takes the likeliest token every time, above it samples.
        top_k: sample among the k likeliest, >= 1.
        seed: of the sampling, which has a generator of its own; in 0 to 2**63 - 1.

    Raises:
        ValueError: a count, temperature or seed out of range.
    """
    check_sampling(tokens, temperature, top_k, seed)
    specials = (tokenizer.bos_id, tokenizer.eos_id)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for logits_V in _follow(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], chosen):
        token = _choose(logits_V, temperature, top_k, generator)
        if token in specials:
            break
        chosen.append(token)
        if len(chosen) == tokens:
            break
    return tokenizer.decode([token for token in chosen if token != tokenizer.pad_id])


@torch.inference_mode()
def _follow(model: CompactModel, prompt: list[int], chosen: list[int]) -> Iterator[Tensor]:
    """The logits [V] after the prompt, then after each token that the caller has put into `chosen`."""
    device = next(model.parameters()).device
    state = model.new_state(1, device)
    block, start = prompt, 0
    while True:
        tokens_BT = torch.tensor([block], device=device)
        hidden_BTD, state = model.hidden(tokens_BT, contiguous(1, len(block), start, device), state)
        yield model.logits(hidden_BTD[0, -1])
        start += len(block)
        block = chosen[-1:]


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token, on the CPU, where the same seed gives the same choice for every device."""
    logits_V = logits_V.double().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    best, tokens = logits_V.topk(min(top_k, logits_V.numel()))
    weights = ((best - best[0]) / temperature).softmax(-1)
    return int(tokens[torch.multinomial(weights, 1, generator=generator)])
