"""Continuing a text with transformers' `generate`."""

import math

import torch
from transformers import PreTrainedModel

from trihybrid.data.tokens import TextTokenizer


def complete(
    model: PreTrainedModel,
    tokenizer: TextTokenizer,
    prompt: str,
    tokens: int = 100,
    temperature: float = 0.0,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The continuation of `prompt`, without the prompt.

    Args:
        model: teacher or student.
        tokenizer: the model's.
        prompt: any text; a beginning-of-sequence token goes before it.
        tokens: at most this many new ones.
        temperature: 0 takes the likeliest token every time, above it samples.
        top_k: sample among the k likeliest.
        seed: of the sampling; torch's generator is put back afterwards.

    Raises:
        ValueError: a count, temperature or seed out of range.
    """
    if tokens < 1 or top_k < 1:
        raise ValueError(f"tokens is {tokens} and top_k {top_k}; both must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature is {temperature}; it must be 0 (likeliest token) or a finite number above"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must lie in 0 to 2**63 - 1")
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k}
        if temperature
        else {"do_sample": False}
    )
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]], device=model.device)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_id,
            eos_token_id=[tokenizer.eos_id, tokenizer.bos_id],
            **sampling,
        )
    return tokenizer.decode(
        [token for token in output[0, ids.shape[1] :].tolist() if token not in _special(tokenizer)]
    )


def _special(tokenizer: TextTokenizer) -> tuple[int, ...]:
    return tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id
