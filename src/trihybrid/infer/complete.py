"""Continuing a text with transformers' `generate`."""

import torch
from transformers import PreTrainedModel

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.section import check_sampling


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
    check_sampling(tokens, temperature, top_k, seed)
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
