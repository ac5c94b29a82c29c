"""Traps of Gemma-4 and of transformers, one test each, named after what goes wrong without care."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, Gemma4ForCausalLM, StaticCache

from trihybrid.mixers.contract import Mixer
from trihybrid.models.cache import CACHE
from trihybrid.models.checkpoint import load_teacher
from trihybrid.models.families import FAMILIES
from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM

MakeModel = Callable[..., TrihybridGemma4ForCausalLM]
MakeConfig = Callable[..., TrihybridGemma4Config]
Tokens = Callable[..., Tensor]
Difference = Callable[[Tensor, Tensor], float]


# Names and fields by which transformers decides


def test_no_class_name_holds_rwkv_or_mamba() -> None:
    """With "rwkv" generate makes no cache; with "mamba" it passes the cache under another name."""
    for family in FAMILIES:
        classes = (family.student, family.student.decoder, family.student.config_class)
        names = [kind.__name__ for kind in classes] + [family.student_type]
        assert not [name for name in names if "rwkv" in name.lower() or "mamba" in name.lower()]
        assert family.student._supports_default_dynamic_cache()


def test_num_kv_shared_layers_is_not_exposed(config: MakeConfig, layout: str) -> None:
    """With it, a cache has no slot for the recurrences behind the first sharing layer."""
    made = config(layout)
    assert made.base_config["num_kv_shared_layers"] == 2
    assert not hasattr(made, "num_kv_shared_layers")
    assert "num_kv_shared_layers" not in {name for name in made.to_dict() if name != "base_config"}
    assert len(DynamicCache(config=made).layers) == len(StaticCache(config=made, max_cache_len=8).layers) == 6


def test_fields_that_differ_between_layers_can_be_read(config: MakeConfig) -> None:
    """`head_dim` of the teacher as a whole raises an error that `getattr` with a default does not swallow; so does
    `num_key_value_heads` of the larger shapes."""
    made = config("partial", attention_k_eq_v=True, num_global_key_value_heads=2)
    with pytest.raises(Exception, match="per-layer attribute"):
        getattr(made.base(), "head_dim", None)
    assert (made.head_dim, made.num_key_value_heads) == (16, 1)
    assert made.base().per_layer_config["full_attention"].num_key_value_heads == 2


def test_tied_weights_are_a_dict() -> None:
    """A list, as before transformers 5, crashes saving."""
    assert TrihybridGemma4ForCausalLM._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_state_that_cannot_go_back_is_declared() -> None:
    assert TrihybridGemma4ForCausalLM._is_stateful


# Checkpointing


@pytest.mark.parametrize(
    "options", [{}, {"use_reentrant": True}, {"use_reentrant": None}, {"preserve_rng_state": True}]
)
def test_reentrant_checkpointing_is_refused(
    student: MakeModel, options: dict[str, Any], checkpointing: Callable[..., None]
) -> None:
    """It keeps the loss and loses gradients; `{}` falls back to it, `None` does not."""
    model = student("tica_shared")
    with pytest.raises(ValueError, match=r'loses gradients of shared.*"use_reentrant": False'):
        checkpointing(model, options)
    with pytest.raises(ValueError, match="use_reentrant"):
        checkpointing(model.model, options)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize(
    "options", [None, {"use_reentrant": False}, {"use_reentrant": False, "determinism_check": "none"}]
)
def test_other_checkpointing_is_not(
    student: MakeModel, options: dict[str, Any] | None, checkpointing: Callable[..., None]
) -> None:
    model = student("tica_shared")
    checkpointing(model, options)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    switch = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    switch()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_checkpointing_and_the_default_cache(
    student: MakeModel, tokens: Tokens, checkpointing: Callable[..., None]
) -> None:
    """A layer that is run again must not write a cache twice: transformers makes none, and gradients stay exact."""
    model, ids = student("tica_shared").train(), tokens(1, 12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    checkpointing(model)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert CACHE not in out
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


# Cache slots


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_goes_by_both_names_of_transformers(student: MakeModel, tokens: Tokens, name: str) -> None:
    """5.24 renamed the argument; code that was written for either name continues the same text."""
    model, ids = student("tica_shared"), tokens(1, 12)
    last = model(ids[:, 9:], **{name: model(ids[:, :9])[CACHE]})
    assert torch.equal(last.logits, model(ids[:, 9:], **{CACHE: model(ids[:, :9])[CACHE]}).logits)
    assert last[CACHE].get_seq_length() == 12


@torch.no_grad()
def test_two_caches_are_refused(student: MakeModel, tokens: Tokens) -> None:
    model, ids = student("tica_shared"), tokens(1, 4)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=model(ids)[CACHE], past_key_values=model(ids)[CACHE])


@torch.no_grad()
def test_a_recurrence_marks_its_slot_as_filled(
    student: MakeModel, tokens: Tokens, typical_layout: str
) -> None:
    """transformers sets that mark for convolution states only."""
    model = student(typical_layout)
    cache = model(tokens(1, 9))[CACHE]
    for index, slot in enumerate(model.config.slot_list()):
        if "rwkv7" in slot.mixers:
            assert cache.has_previous_state(index)
            assert cache.layers[index].recurrent_states[0].shape == (1, 4, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize("name", ["rwkv7_only", "tica_on_one", "recurrence_first"])
def test_tokens_are_counted_where_the_first_slots_store_none(
    student: MakeModel, tokens: Tokens, name: str
) -> None:
    """A linear slot has no length, and sizing a mask by one raises; full attention may stand behind several."""
    model, ids = student(name), tokens(1, 20)
    cache = None
    for begin, end in ((0, 11), (11, 12), (12, 20)):
        cache = model(ids[:, begin:end], **{CACHE: cache})[CACHE]
        assert int(cache.get_seq_length()) == end


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "bytes_a_token"),
    # Float32: TICA stores 2 x 8 numbers a token and slot, a full layer of the teacher 2 x 32.
    [
        ("retained", 2 * 256),
        ("tica_everywhere", 3 * 64),
        ("tica_shared", 64),
        ("rwkv7_only", 0),
        ("partial", 64 + 256),
    ],
)
def test_what_a_token_costs_in_the_cache(
    student: MakeModel, tokens: Tokens, name: str, bytes_a_token: int
) -> None:
    """Sharing in the teacher saves bytes that own keys and values in every converted slot would bring back."""
    model, ids = student(name), tokens(1, 40)

    def held(cache: DynamicCache) -> int:
        found = [
            t for slot in cache.layers for t in (getattr(slot, "keys", None), getattr(slot, "values", None))
        ]
        found += [state for slot in cache.layers for state in getattr(slot, "recurrent_states", {}).values()]
        return sum(t.numel() * t.element_size() for t in found if t is not None)

    sizes = [held(model(ids[:, :length])[CACHE]) for length in (20, 40)]
    assert sizes[1] - sizes[0] == 20 * bytes_a_token


@torch.no_grad()
def test_a_snapshot_must_be_a_copy(student: MakeModel, tokens: Tokens, difference: Difference) -> None:
    """A recurrent slot is updated in place, so a kept reference moves on; a copy continues where it was taken."""
    model, ids = student("tica_everywhere"), tokens(1, 16)
    cache = model(ids[:, :10])[CACHE]
    state = cache.layers[1].recurrent_states[0]
    snapshot, kept = copy.deepcopy(cache), state.clone()
    first = model(ids[:, 10:], **{CACHE: cache}).logits
    assert not torch.equal(state, kept)
    assert torch.equal(snapshot.layers[1].recurrent_states[0], kept)
    assert torch.equal(model(ids[:, 10:], **{CACHE: snapshot}).logits, first)


@torch.no_grad()
def test_a_cache_repeated_over_rows_is_not_silently_wrong(student: MakeModel, tokens: Tokens) -> None:
    """transformers' `batch_repeat_interleave` repeats keys and values and leaves recurrent states as they were."""
    model, ids = student("tica_everywhere"), tokens(2, 10)
    cache = model(ids)[CACHE]
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"state_BHKV has shape \(2, 4, 8, 8\); expected \(4, 4, 8, 8\)"):
        model(tokens(4, 1), **{CACHE: cache})


@torch.no_grad()
def test_a_reset_cache_is_an_empty_one(student: MakeModel, tokens: Tokens, typical_layout: str) -> None:
    model, ids = student(typical_layout), tokens(1, 10)
    cache = StaticCache(config=model.config, max_cache_len=12)
    fresh = model(ids, **{CACHE: cache}).logits
    cache.reset()
    assert torch.equal(model(ids, **{CACHE: cache}).logits, fresh)


# Sharing


def test_converted_layers_hold_nothing_of_the_teachers_attention(student: MakeModel, layout: str) -> None:
    """Nor does a retained sharing layer hold key and value projections, which no forward reads."""
    model = student(layout)
    for index, (layer, slot) in enumerate(zip(model.model.layers, model.config.slot_list(), strict=True)):
        names = {name.split(".")[0] for name, _ in layer.self_attn.named_parameters()}
        if slot.converted:
            assert names == set(slot.mixers)
            for mixer in layer.self_attn.mixers():
                assert isinstance(mixer, Mixer)
                own = {name for name, _ in mixer.named_parameters() if name.startswith(("k", "v"))}
                assert bool(own) == (mixer.kind not in slot.donors)
        else:
            assert names == {"q_proj", "q_norm", "o_proj"} | (
                {"k_proj", "k_norm", "v_proj"} if index < 4 else set()
            )


@torch.no_grad()
def test_keys_and_values_of_the_donor_are_what_is_read(student: MakeModel, tokens: Tokens) -> None:
    """A change of the donor's values, whose own output is cut off, moves the reader."""
    for name, weight in (("tica_shared", "tica.v_proj"), ("rwkv7_shared", "rwkv7.value")):
        model, ids = student(name), tokens(1, 10)
        donor = model.config.slot_list()[5].donors[weight.split(".")[0]]
        mixer = getattr(model.model.layers[donor].self_attn, weight.split(".")[0])
        (mixer.o_proj if mixer.kind == "tica" else mixer.output).weight.zero_()
        if name == "tica_shared":
            model.model.layers[3].self_attn.tica.o_proj.weight.zero_()
        hidden = {}
        for _ in range(2):
            out = model(ids, output_hidden_states=True)
            hidden[len(hidden)] = (out.hidden_states[5], out.logits)
            model.get_parameter(f"model.layers.{donor}.self_attn.{weight}.weight").mul_(-1)
        assert torch.equal(hidden[0][0], hidden[1][0])
        assert not torch.allclose(hidden[0][1], hidden[1][1], atol=1e-3)


# Checkpoints of teachers


def test_a_published_prefix_is_not_silently_random(
    teacher: Callable[..., Gemma4ForCausalLM], tmp_path: Path
) -> None:
    """Tensors under `model.language_model.` match no name of the text model, and transformers would draw them all."""
    teacher().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="tensors are missing"):
        load_teacher(tmp_path)


def test_keys_and_values_of_sharing_layers_in_a_file_are_ignored(
    teacher: Callable[..., Gemma4ForCausalLM], tmp_path: Path
) -> None:
    """Published files carry them for every layer; they are never read, and nothing may start from them."""
    model = teacher()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    surplus = {
        f"model.layers.5.self_attn.{name}.weight": torch.randn(32, 32) for name in ("k_proj", "v_proj")
    }
    save_file(load_file(path) | surplus, path, metadata={"format": "pt"})
    loaded = load_teacher(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_the_teacher_is_stored_in_a_way_that_reads_back(config: MakeConfig, tmp_path: Path) -> None:
    """transformers 5.14 and later write `per_layer_config` in the place of `global_head_dim`."""
    config("partial").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    again = TrihybridGemma4Config.from_pretrained(tmp_path)
    assert again.base().per_layer_config["full_attention"].head_dim == 32
    assert again.base().per_layer_config["sliding_attention"].head_dim == 16
    assert "per_layer_config" not in {name for name in written if name != "base_config"}


# Adapters


# peft 0.21 asks transformers 5.23 for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_one_step(student: MakeModel, tokens: Tokens) -> None:
    """PEFT on projections of both mixers and of retained attention: the adapter alone moves, and the loss falls."""
    model, ids = student("partial").train(), tokens(2, 16)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = ["receptance", "value", "q_proj", "k_proj"]
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * (4 + 6 + 2)
    optimizer = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(2):
        out = adapted(input_ids=ids, labels=ids, use_cache=False)
        losses.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        assert not [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
    assert losses[1] < losses[0]
    for name, tensor in adapted.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "")
        assert "lora_" in name or torch.equal(tensor, frozen[plain]), name
