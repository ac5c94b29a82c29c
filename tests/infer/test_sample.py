"""A compact model continues a text from its state as it would by reading everything again."""

import pytest
import torch

from trihybrid.data.tokens import Tokenizer
from trihybrid.infer.sample import sample
from trihybrid.models.compact import CompactModel, CompactSection

PROMPT = "the slow river "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> CompactModel:
    """All parts on, a window of 4, and parameters far from their start, so that every mixer counts."""
    section = CompactSection(
        hidden_size=16,
        pattern="TWXRF",
        legend={
            "T": "token_shift",
            "W": {"mixer": "sliding", "window": 4},
            "X": {"mixer": "sliding", "window": 4, "xsa": True},
            "R": "rwkv7",
            "F": {"mixer": "full", "xsa": True},
        },
        heads=2,
        kv_heads=1,
        head_dim=8,
        rope_dims=4,
        bigram_buckets=32,
        bigram_width=8,
        value_embedding_width=8,
        value_embedding_layers=[2, 4],
        rwkv7={
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 8,
            "decay_rank": 4,
            "iclr_rank": 4,
            "gate_rank": 4,
        },
    )
    model = CompactModel(section, tokenizer.vocab_size).double()
    torch.manual_seed(5)
    model.initialise()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def test_greedy_takes_the_likeliest_token_every_time(model: CompactModel, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    start = len(ids)
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[start:])
    assert len(set(ids[start:])) > 3
    texts = {sample(model, tokenizer, PROMPT, tokens=12, seed=seed) for seed in (0, 1)}
    assert texts == {tokenizer.decode(ids[start:])}


def test_the_seed_decides_what_is_sampled(model: CompactModel, tokenizer: Tokenizer) -> None:
    def text(seed: int) -> str:
        return sample(model, tokenizer, PROMPT, tokens=16, temperature=2.0, top_k=200, seed=seed)

    first = text(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert text(1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert len({text(seed) for seed in range(4)}) == 4


def test_the_likeliest_of_one_is_greedy(model: CompactModel, tokenizer: Tokenizer) -> None:
    greedy = sample(model, tokenizer, PROMPT, tokens=8)
    assert sample(model, tokenizer, PROMPT, tokens=8, temperature=5.0, top_k=1, seed=3) == greedy


def test_sampling_follows_the_probabilities(
    model: CompactModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens of probability 3/4 and 1/4, drawn 4,000 times: three standard deviations are 0.0206."""
    logits_V = torch.full((tokenizer.vocab_size,), -100.0)
    logits_V[4 + ord("a")], logits_V[4 + ord("b")] = torch.tensor([3.0, 1.0]).log()
    monkeypatch.setattr(model, "logits", lambda hidden: logits_V)
    monkeypatch.setattr(model, "hidden", lambda tokens_BT, span, state: (torch.zeros(1, 1, 16), None))
    text = sample(model, tokenizer, "", tokens=4000, temperature=1.0)
    assert set(text) == {"a", "b"} and abs(text.count("a") / 4000 - 0.75) < 0.0206


def test_a_document_ends_the_text(
    model: CompactModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [4 + ord("o"), 4 + ord("k"), tokenizer.bos_id, 4 + ord("x")]
    rows = iter(torch.nn.functional.one_hot(torch.tensor(wanted), tokenizer.vocab_size).double())
    monkeypatch.setattr(model, "logits", lambda hidden: next(rows))
    assert sample(model, tokenizer, "is it ", tokens=4) == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens is 0 and top_k 50; both must be at least 1"),
        ({"top_k": 0}, "tokens is 100 and top_k 0"),
        ({"temperature": -0.1}, r"temperature is -0\.1; it must be 0 \(likeliest token\) or a finite number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": -1}, r"seed is -1; it must lie in 0 to 2\*\*63 - 1"),
    ],
)
def test_what_is_out_of_range_is_named(
    model: CompactModel, tokenizer: Tokenizer, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, tokenizer, PROMPT, **arguments)
