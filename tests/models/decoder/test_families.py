"""Students of every family: their teacher's numbers, blocks of tokens, padding, packing, generation, saving.

Legend: B batch, T tokens.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from tiny_teachers import LAYERS, TEACHERS, VOCABULARY, WINDOW, build_student, build_teacher, student_config
from trihybrid.models.cache import CACHE
from trihybrid.models.decoder.language_model import HybridForCausalLM
from trihybrid.models.families import FAMILIES, register
from trihybrid.testing import relative_error

register()

FLOAT32 = 1e-5
# Prefill past the window of 8, single tokens, a block longer than the window, single tokens.
CUTS = [0, 13, 14, 15, 30, *range(31, 37)]
LAYOUTS = ["....", ".R.B", "BBBB", "WRWB", "RTWR"]
# Every family with two or three layouts, every layout with four or five families.
CASES = [
    (name, layout)
    for (i, name), (j, layout) in itertools.product(enumerate(TEACHERS), enumerate(LAYOUTS))
    if (i + j) % 2 == 0
]
# Every family once, and every layout at least once.
TYPICAL = list(zip(TEACHERS, itertools.cycle(LAYOUTS[1:])))


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: HybridForCausalLM, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The teacher's own numbers


@torch.no_grad()
def same_numbers(student, teacher) -> None:
    """To the bit: padded, packed, and token by token over a cache."""
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    packed = torch.cat([torch.arange(12), torch.arange(8)]).expand(2, -1)
    for arguments in ({}, {"attention_mask": mask}, {"position_ids": packed, "use_cache": False}):
        assert torch.equal(student(ids, **arguments).logits, teacher(ids, **arguments).logits)
    ours, theirs = (model(ids[:, :13], use_cache=True) for model in (student, teacher))
    for index in range(13, 20):
        token = ids[:, index : index + 1]
        ours, theirs = (
            model(token, **{CACHE: out[CACHE]}, use_cache=True)
            for model, out in ((student, ours), (teacher, theirs))
        )
        assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("name", TEACHERS)
def test_unconverted_student_is_the_teacher(name) -> None:
    teacher, student = build_teacher(name), build_student(name, "....")
    student.load_state_dict(teacher.state_dict())
    assert type(student).__name__.startswith("Trihybrid")
    same_numbers(student, teacher)


@pytest.mark.parametrize(
    ("name", "layout", "sibling"),
    [("mistral", "WWWW", "mistral-windowed"), ("qwen3", "..WW", "qwen3-windowed")],
)
def test_full_layers_that_became_sliding_ones_are_those_of_a_windowed_teacher(name, layout, sibling) -> None:
    """The same weights in a teacher of the family that has windows there."""
    tied = {"tie_word_embeddings": True}
    teacher, student = build_teacher(sibling, **tied), build_student(name, layout, **tied)
    student.load_state_dict(teacher.state_dict())
    assert student.config.sliding_window == WINDOW
    same_numbers(student, teacher)


@torch.no_grad()
def test_a_global_layer_of_gemma_3_with_a_window_keeps_its_own_rotary_table() -> None:
    """Up to the window's length nothing changes; its neighbour's table would change all."""
    teacher, student = build_teacher("gemma3"), build_student("gemma3", ".W.W")
    student.load_state_dict(teacher.state_dict())
    ids = tokens(2, 20)
    ours, theirs = student(ids).logits, teacher(ids).logits
    assert relative_error(ours[:, :WINDOW], theirs[:, :WINDOW]) < FLOAT32
    assert relative_error(ours[:, WINDOW:], theirs[:, WINDOW:]) > 1e-3


# Blocks of tokens


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_chunks_with_a_cache_are_one_pass(name, layout) -> None:
    model, ids = build_student(name, layout), tokens(2, 36)
    whole = model(ids, use_cache=False)
    cache, parts = None, []
    for begin, end in itertools.pairwise(CUTS):
        out = model(ids[:, begin:end], **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        parts.append(out.logits)
    assert relative_error(torch.cat(parts, 1), whole.logits) < FLOAT32
    assert int(cache.get_seq_length()) == 36


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_chunks_with_a_preallocated_cache_are_one_pass(name, layout) -> None:
    model, ids = build_student(name, layout), tokens(2, 30)
    cache = StaticCache(config=model.config, max_cache_len=37)
    parts = [model(ids[:, a:b], **{CACHE: cache}).logits for a, b in ((0, 13), (13, 14), (14, 25), (25, 30))]
    assert relative_error(torch.cat(parts, 1), model(ids, use_cache=False).logits) < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_left_padding_changes_nothing(name, layout) -> None:
    model, ids = build_student(name, layout), tokens(1, 22)
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1), tokens(1, 28, seed=2)])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    alone = model(ids).logits
    assert relative_error(model(batch, attention_mask=mask).logits[:1, 6:], alone) < FLOAT32
    cache, parts = None, []
    for begin, end in ((0, 9), (9, 10), (10, 24), (24, 28)):
        out = model(batch[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}, use_cache=True)
        cache = out[CACHE]
        parts.append(out.logits)
    assert relative_error(torch.cat(parts, 1)[:1, 6:], alone) < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_packed_documents_are_separate(name, layout) -> None:
    model, ids, lengths = build_student(name, layout), tokens(2, 40), [17, 1, 12, 10]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, position_ids=position_ids).logits
    alone = torch.cat([model(document).logits for document in ids.split(lengths, 1)], 1)
    assert relative_error(packed, alone) < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_later_tokens_change_nothing_earlier(name, layout) -> None:
    model, ids = build_student(name, layout), tokens(1, 24)
    other = ids.clone()
    other[:, 15] = (other[:, 15] + 1) % 90 + 3
    before, after = model(ids).logits, model(other).logits
    assert relative_error(after[:, :15], before[:, :15]) < FLOAT32
    assert relative_error(after[:, 15:], before[:, 15:]) > 1e-2


# What transformers does with it


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_greedy_with_cache_is_greedy_without(name, layout) -> None:
    model, ids = build_student(name, layout), tokens(2, 10)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 2}
    cached = model.generate(ids, **options)
    assert cached.shape == (2, 22)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_beams_static_caches_and_padded_batches_are_plain_generation(name, layout) -> None:
    model = build_student(name, layout)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "no_repeat_ngram_size": 2}
    ids = tokens(2, 10)
    beams = {"num_beams": 3}
    assert torch.equal(
        model.generate(ids, **options, **beams), model.generate(ids, use_cache=False, **options, **beams)
    )
    assert torch.equal(
        model.generate(ids, cache_implementation="static", **options), model.generate(ids, **options)
    )
    rows = [tokens(1, length, seed=length) for length in (5, 13)]
    batch = torch.cat([torch.nn.functional.pad(row, (13 - row.shape[1], 0)) for row in rows])
    together = model.generate(batch, attention_mask=(batch != 0).long(), **options)
    for row, alone in enumerate(rows):
        assert torch.equal(together[row, 13:], model.generate(alone, **options)[0, alone.shape[1] :])


@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_auto_classes_load_it_to_the_bit(name, layout, tmp_path: Path) -> None:
    model, ids = build_student(name, layout), tokens(2, 12)
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(model)
    assert not any(info.values())
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert loaded.config.slot_list() == model.config.slot_list()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(
            AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state, model.model(ids).last_hidden_state
        )
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == loaded.config.tie_word_embeddings


@pytest.mark.parametrize(("name", "kept"), [("gemma3", 0.0), ("llama-biased", 1.0)])
def test_a_missing_norm_starts_as_its_family_starts_it(name, kept, tmp_path: Path) -> None:
    """Gemma 3 multiplies by one plus its weight. Ours start at one, and biases at zero."""
    layout = "WRWB"
    model = build_student(name, layout)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    left_out = {
        "model.layers.1.input_layernorm.weight": kept,
        "model.norm.weight": kept,
        "model.layers.1.self_attn.rwkv7.r_norm.weight": 1.0,
        "model.layers.3.self_attn.tica.o_proj.weight": 0.0,
    } | ({"model.layers.1.self_attn.rwkv7.key.bias": 0.0} if name == "llama-biased" else {})
    save_file(
        {key: tensor for key, tensor in load_file(path).items() if key not in left_out},
        path,
        metadata={"format": "pt"},
    )
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(left_out)
    for key, tensor in loaded.state_dict().items():
        assert (
            bool((tensor == left_out[key]).all())
            if key in left_out
            else torch.equal(tensor, model.state_dict()[key])
        )


@pytest.mark.parametrize("name", TEACHERS)
def test_a_fresh_model_has_no_memory_left_unwritten(name) -> None:
    config = student_config(name, "WRWB")
    family = next(family for family in FAMILIES if family.student_type == config.model_type)
    for key, tensor in family.student(config).state_dict().items():
        assert bool(torch.isfinite(tensor).all()), key


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_eager_is_sdpa(name, layout) -> None:
    """Chosen after the model was built, too."""
    model, ids = build_student(name, layout), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    reference = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    first = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
    second = model(ids[:, 12:], attention_mask=mask, **{CACHE: first[CACHE]}, use_cache=True)
    eager = torch.cat([first.logits, second.logits], 1)
    assert relative_error(eager[0, 5:], reference[0, 5:]) < FLOAT32
    assert relative_error(eager[1], reference[1]) < FLOAT32


def test_an_attention_that_asks_the_module_for_its_window_is_refused() -> None:
    model = build_student("llama", "WRWB")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r'is "flash_attention_2"; full layers that became sliding ones need'
    ):
        model(tokens(1, 4))


@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_checkpointing_is_exact_for_every_parameter(name, layout) -> None:
    model, ids = build_student(name, layout).train(), tokens(2, 20)
    expected = gradients(model, ids, use_cache=False)
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch(None)
    actual = gradients(model, ids, use_cache=False)
    assert expected.keys() == actual.keys() == {key for key, _ in model.named_parameters()}
    for key, gradient in expected.items():
        assert bool(gradient.any()), key
        assert torch.equal(actual[key], gradient), key


@torch.no_grad()
@pytest.mark.parametrize(("name", "layout"), TYPICAL)
def test_hidden_states_are_one_a_layer(name, layout) -> None:
    model, ids = build_student(name, layout), tokens(2, 10)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    hidden, stream = model.model.prepare(ids)
    for index in range(LAYERS):
        assert torch.equal(hidden, out.hidden_states[index])
        hidden = model.model.layer(index, hidden, stream)
    assert torch.equal(model.model.norm(hidden), out.hidden_states[-1])


@torch.no_grad()
def test_a_teachers_layer_sees_what_the_teacher_saw() -> None:
    """All of the teacher's layers, carried by a student's stream, give the teacher's hidden states: in the place of
    recurrences, of windows, and beside its own."""
    for name, layout in TYPICAL:
        teacher, model, ids = build_teacher(name), build_student(name, layout), tokens(2, 20)
        model.model.load_state_dict(teacher.model.state_dict(), strict=False)
        types = {attention.layer_type for attention in model.model.anatomy.attentions}
        hidden, stream = model.model.prepare(ids, layer_types=types)
        for index, layer in enumerate(teacher.model.layers):
            hidden = model.model.layer(index, hidden, stream, layer)
        assert torch.equal(teacher.model.norm(hidden), teacher.model(ids).last_hidden_state), name


@pytest.mark.parametrize("name", TEACHERS)
def test_rotary_frequencies_stay_float32(name, tmp_path: Path) -> None:
    build_student(name, ".R.B").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    frequencies = {key: b for key, b in loaded.model.rotary_emb.named_buffers() if "inv_freq" in key}
    assert frequencies and {b.dtype for b in frequencies.values()} == {torch.float32}
    assert loaded(tokens(1, 4)).logits.dtype == torch.bfloat16


def test_every_family_has_a_tiny_teacher_and_a_cache_with_every_slot() -> None:
    seen = set()
    for name in TEACHERS:
        config = student_config(name, "WRWB")
        seen.add(config.model_type)
        assert len(DynamicCache(config=config).layers) == LAYERS
        assert config.layer_types[1] == "linear_attention" and config.layer_types[3] == "hybrid"
        assert config.base().to_dict() == config.base_config
    assert seen | {"trihybrid_gemma4"} == {family.student_type for family in FAMILIES}


def test_experts_are_computed_as_the_model_is_told() -> None:
    model, ids = build_student("qwen3-experts", ".R.B"), tokens(2, 9)
    found = []
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            found.append(model(ids).logits)
    assert relative_error(found[1], found[0]) < FLOAT32
    assert not build_student("llama", ".R.B")._can_set_experts_implementation()


def test_per_layer_inputs_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="per_layer_inputs are given, but llama has none; leave them out"):
        build_student("llama", ".R.B")(tokens(1, 4), per_layer_inputs=torch.zeros(1, 4, 4, 8))
