"""The engine's forward pass is the model's: logits of every family and layout, in chunks of any size, then token by
token in a batch of rows that have seen different numbers of tokens."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny_gemma4
import tiny_teachers
from random_weights import randomise
from small_student import make_student
from trihybrid.infer.network import Network
from trihybrid.infer.network.parts import Fusion
from trihybrid.testing import relative_error

LENGTH, PAGE = 26, 5
STUDENTS = {
    "llama": "R.B.",
    "llama-biased": "RBT.",
    "mistral": "BW..",
    "mistral-windowed": "B.R.",
    "qwen2": "T.RW",
    "qwen3": "RRB.",
    "qwen3-windowed": "RW.B",
    "qwen3-experts": "R.B.",
    "gemma3": ".BWR",
}
GEMMA4 = {
    "gemma4": {},
    "gemma4-plain": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True},
    "gemma4-experts": {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    },
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    if name == "student-gemma4":
        return make_student()
    if name in GEMMA4:
        model = tiny_gemma4.build_teacher(**GEMMA4[name])
        randomise(model)
        return model
    if name.startswith("student-"):
        return tiny_teachers.build_student(name[8:], STUDENTS[name[8:]])
    return tiny_teachers.build_teacher(name)


NAMES = [*GEMMA4, *STUDENTS, "student-gemma4", *(f"student-{name}" for name in STUDENTS)]


def tokens_of(seed: int, vocabulary: int, length: int = LENGTH) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def read(network: Network, tokens: list[int], row: int, pages: list[int], chunk: int) -> Tensor:
    """Logits behind the last token, which is in `row` now; with fast prefill a step has read it."""
    fast = network.fast_prefill
    end, logits = len(tokens) - fast, None
    for start in range(0, end, chunk):
        piece = tokens[start : min(start + chunk, end)]
        logits = network.prefill(piece, row, start, pages, logits=not fast and start + chunk >= end)
    if fast:
        # A step reads the rows in front.
        ids, positions, table = (torch.tensor([x], device=network.device) for x in (tokens[-1], end, pages))
        network.states.swap(0, row)
        logits = network.decode(ids, positions, table)[0]
        network.states.swap(0, row)
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_chunks_and_turns_are_the_forward_pass(name: str) -> None:
    model = build(name)
    vocabulary = model.config.vocab_size
    texts = [tokens_of(seed, vocabulary) for seed in range(3)]
    wanted = [reference(model, text) for text in texts]
    network = Network(copy.deepcopy(model), rows=3, length=PAGE)
    network.states.grow(24)
    # Pages of the three in turns, and in an order that is no run.
    pages = [[1 + row + 3 * place for place in reversed(range(6))] for row in range(3)]
    for row, (start, chunk) in enumerate([(19, 19), (7, 3), (1, 1)]):
        logits_V = read(network, texts[row][:start], row, pages[row], chunk)
        assert relative_error(logits_V, wanted[row][start - 1]) < 1e-5
    seen = [19, 7, 1]
    table = torch.tensor(pages)
    for _ in range(LENGTH - 19):
        ids = torch.tensor([text[place] for text, place in zip(texts, seen, strict=True)])
        logits_BV = network.decode(ids, torch.tensor(seen), table)
        for row, place in enumerate(seen):
            assert relative_error(logits_BV[row], wanted[row][place]) < 1e-5
        seen = [place + 1 for place in seen]


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 11, 25, 26])
@pytest.mark.parametrize("name", ["gemma4", "student-gemma4", "student-gemma3"])
@torch.inference_mode()
def test_chunks_of_any_size_are_the_forward_pass(name: str, chunk: int) -> None:
    model = build(name)
    text = tokens_of(5, model.config.vocab_size)
    wanted = reference(model, text)[-1]
    network = Network(model, rows=1, length=PAGE)
    network.states.grow(8)
    assert relative_error(read(network, text, 0, [1, 2, 3, 4, 5, 6], chunk), wanted) < 1e-5


@pytest.mark.gpu
@torch.inference_mode()
def test_chunks_by_kernels_are_as_near_to_float32_as_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks longer than a window and shorter, of heads that the kernels take; over several texts, since of one the
    errors of both ways are apart by chance."""
    model = tiny_gemma4.build_teacher(head_dim=32, global_head_dim=64, sliding_window=16).bfloat16()
    randomise(model)
    texts, pages = [tokens_of(seed, model.config.vocab_size, 90) for seed in range(12)], list(range(1, 20))

    def behind(dtype: torch.dtype) -> Tensor:
        network = Network(copy.deepcopy(model).to("cuda", dtype), rows=1, length=PAGE)
        network.states.grow(20)
        cuts = ((90, 41), (64, 9))
        return torch.stack(
            [read(network, text[:end], 0, pages, chunk) for text in texts for end, chunk in cuts]
        )

    kernels, exact = behind(torch.bfloat16), behind(torch.float32)
    monkeypatch.setattr(Fusion, "of_kernels", Fusion)
    plain = relative_error(behind(torch.bfloat16), exact)
    assert plain < 0.15 and relative_error(kernels, exact) <= 1.5 * plain
