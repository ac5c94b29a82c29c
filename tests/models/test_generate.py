"""generate and pipelines: with a cache as without, padded as alone, in one go as in turns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, StaticCache, pipeline

from trihybrid.data import Tokenizer
from trihybrid.models.cache import CACHE
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM

MakeModel = Callable[..., TrihybridGemma4ForCausalLM]
Tokens = Callable[..., Tensor]


def generate(model: TrihybridGemma4ForCausalLM, ids: Tensor | None, new: int = 8, **options: Any) -> Any:
    """`new` tokens, greedily unless options say otherwise; the end token does not stop it, and no pair of tokens may
    repeat (a tied random model likes to repeat itself)."""
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 2}
    return model.generate(ids, **(settings | options))


def test_greedy_with_cache_is_greedy_without(student: MakeModel, tokens: Tokens, layout: str) -> None:
    model, ids = student(layout), tokens(2, 10)
    cached = generate(model, ids, new=12)
    assert cached.shape == (2, 22)
    assert torch.equal(cached, generate(model, ids, new=12, use_cache=False))
    assert min(len(set(row)) for row in cached[:, 10:].tolist()) > 3


def test_beams_with_cache_are_beams_without(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    """Beams move between rows, and every state has to move with them."""
    model, ids = student(typical_layout), tokens(2, 10)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    cached = generate(model, ids, **beams)
    assert cached.shape == (4, 18)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **beams))


@pytest.mark.parametrize("name", ["tica_everywhere", "recurrence_first"])
def test_sampling_is_its_seed_with_and_without_a_cache(student: MakeModel, tokens: Tokens, name: str) -> None:
    model, ids = student(name), tokens(1, 10)
    drawn = []
    for seed, use_cache in ((5, True), (5, False), (6, True)):
        torch.manual_seed(seed)
        options = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "temperature": 1.5}
        drawn.append(generate(model, ids, use_cache=use_cache, **options))
    assert drawn[0].shape == (3, 18)
    assert len({tuple(row) for row in drawn[0].tolist()}) == 3
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_left_padded_batch_is_each_row_alone(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    model, lengths = student(typical_layout), [5, 13, 9]
    rows = [tokens(1, length, seed=length) for length in lengths]
    batch = torch.cat([torch.nn.functional.pad(row, (13 - row.shape[1], 0)) for row in rows])
    mask = (batch != 0).long()
    together = generate(model, batch, attention_mask=mask)
    for row, ids in enumerate(rows):
        assert torch.equal(together[row, 13:], generate(model, ids)[0, ids.shape[1] :])


def test_static_cache_is_dynamic_cache(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    model, ids = student(typical_layout), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    static = generate(model, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, generate(model, ids, attention_mask=mask))


def test_prefill_in_chunks(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    model, ids = student(typical_layout), tokens(2, 21)
    assert torch.equal(generate(model, ids, prefill_chunk_size=6), generate(model, ids))


@pytest.mark.parametrize("static", [False, True])
def test_a_second_turn_is_a_fresh_start_with_all_tokens(
    student: MakeModel, tokens: Tokens, typical_layout: str, static: bool
) -> None:
    model = student(typical_layout)
    cache = (
        StaticCache(config=model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
    )
    first = generate(model, tokens(1, 9), **{CACHE: cache})
    question = torch.cat([first, tokens(1, 7, seed=3)], 1)
    second = generate(model, question, **{CACHE: cache})
    assert second.shape == (1, 9 + 8 + 7 + 8)
    assert torch.equal(second, generate(model, question))


def test_from_embeddings(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    model, ids = student(typical_layout), tokens(2, 10)
    embeddings = model.get_input_embeddings()(ids).detach()
    options = {"no_repeat_ngram_size": 0}  # it would know the prompt in one of the two cases only
    continued = generate(model, None, inputs_embeds=embeddings, **options)
    assert torch.equal(continued, generate(model, ids, **options)[:, 10:])


def test_an_unconverted_student_generates_as_its_teacher(
    teacher: Callable, student: MakeModel, tokens: Tokens
) -> None:
    original, model, ids = teacher(), student("retained"), tokens(2, 14)
    model.load_state_dict(original.state_dict())
    assert torch.equal(generate(model, ids, new=20), generate(original, ids, new=20))


def test_decoding_that_takes_tokens_back_is_refused(student: MakeModel, tokens: Tokens) -> None:
    """A recurrence cannot forget the tokens that assisted decoding rejects."""
    model, ids = student("tica_everywhere"), tokens(1, 10)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids, assistant_model=student("retained"))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids, prompt_lookup_num_tokens=2)


def test_text_generation_pipeline(student: MakeModel, tmp_path: Path) -> None:
    """From a folder, by the Auto classes, with a batch of texts of unequal length."""
    student("tica_everywhere", vocab_size=260, vocab_size_per_layer_input=260).save_pretrained(tmp_path)
    Tokenizer.bytes().save(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert isinstance(write.model, TrihybridGemma4ForCausalLM)
    texts = ["A short one.", "A text that is a little longer, na\u00efve."]
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    alone = [write(text, **options)[0]["generated_text"] for text in texts]
    together = [row[0]["generated_text"] for row in write(texts, batch_size=2, **options)]
    assert together == alone
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    assert ids[0, 0] == 2
    continued = write.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert alone[0] == tokenizer.decode(continued, skip_special_tokens=True)
