"""Completion is transformers' generate: greedy is the likeliest token each time, sampling follows its seed alone."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from trihybrid.data import Tokenizer
from trihybrid.infer.complete import complete
from trihybrid.models.checkpoint import load_model

PROMPT = "the slow river "


@pytest.fixture(scope="module", params=["teacher", "matched"])
def model(micro_run: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    return load_model(micro_run / request.param)


@pytest.fixture(scope="module")
def tokenizer(micro_run: Path) -> Tokenizer:
    return Tokenizer.from_file(micro_run / "teacher")


def test_greedy_takes_the_likeliest_token_every_time(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    start = len(ids)
    with torch.inference_mode():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:])
    texts = {complete(model, tokenizer, PROMPT, tokens=6, seed=seed) for seed in (0, 1)}
    assert texts == {expected}


def test_the_seed_decides_what_is_sampled(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    def sample(seed: int) -> str:
        return complete(model, tokenizer, PROMPT, tokens=16, temperature=2.0, top_k=200, seed=seed)

    first = sample(1)
    torch.manual_seed(99)
    assert sample(1) == first
    assert len({sample(seed) for seed in range(4)}) == 4


def test_the_likeliest_of_one_is_greedy(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    greedy = complete(model, tokenizer, PROMPT, tokens=8)
    assert complete(model, tokenizer, PROMPT, tokens=8, temperature=5.0, top_k=1, seed=3) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_generator_is_put_back(model: PreTrainedModel, tokenizer: Tokenizer, temperature: float) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    complete(model, tokenizer, PROMPT, tokens=2, temperature=temperature)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_new_text_comes_back_and_not_more_than_asked(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    prompt = "<eos> zebra \u00e9t\u00e9 "
    text = complete(model, tokenizer, prompt, tokens=5, temperature=1.0, top_k=200)
    assert prompt not in text and "zebra" not in text
    assert len(text) <= 5  # a token is a byte here, and a byte that is not UTF-8 becomes one character
    assert complete(model, tokenizer, "", tokens=1) == complete(model, tokenizer, "", tokens=3)[:1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens is 0 and top_k 50; both must be at least 1"),
        ({"top_k": 0}, "tokens is 100 and top_k 0"),
        ({"temperature": -0.1}, r"temperature is -0\.1; it must be 0 \(likeliest token\) or a finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"seed": -1}, r"seed is -1; it must lie in 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
    ],
)
def test_what_is_out_of_range_is_named(
    model: PreTrainedModel, tokenizer: Tokenizer, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        complete(model, tokenizer, PROMPT, **arguments)
