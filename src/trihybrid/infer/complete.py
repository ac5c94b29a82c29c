"""Continuing a text with the engine: whole, or piece by piece as it comes."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from trihybrid.data.tokens import TextTokenizer
from trihybrid.infer.engine import Engine
from trihybrid.infer.sampling import Sampling
from trihybrid.infer.section import check_sampling
from trihybrid.infer.text_stream import TextStream


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
        model: teacher or student; an engine takes it over.
        tokenizer: the model's.
        prompt: any text; a beginning-of-sequence token goes before it.
        tokens: at most this many new ones.
        temperature: 0 takes the likeliest token every time, above it samples.
        top_k: sample among the k likeliest.
        seed: of the sampling.

    Raises:
        ValueError: a count, temperature or seed out of range.
    """
    check_sampling(tokens, temperature, top_k, seed)
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    return "".join(pieces(Engine(model), tokenizer, prompt, tokens, sampling))


def pieces(
    engine: Engine,
    tokenizer: TextTokenizer,
    prompt: str,
    tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
) -> Iterator[str]:
    """The continuation of `prompt` as it comes, in pieces of whole characters; it ends early where the model ends the
    document or begins another, or before a stop string.

    Args:
        engine: one with a free row, which the continuation takes until it ends.
        tokenizer, prompt, tokens: as of `complete`.
        sampling: how tokens are chosen.
        stops: strings that end the text and are not part of it.
    """
    stream = TextStream(tokenizer, stops)
    ends = {tokenizer.eos_id, tokenizer.bos_id}
    sequence = engine.add(
        [tokenizer.bos_id, *tokenizer.encode(prompt)], most=tokens, sampling=sampling, stops=ends
    )
    try:
        while engine.busy and not stream.stopped:
            for token in engine.step():
                if token.sequence == sequence and token.id not in ends:
                    yield stream.push(token.id)
    finally:
        engine.remove(sequence)
    yield stream.finish()
