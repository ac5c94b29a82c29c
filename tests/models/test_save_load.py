"""Saving and loading: the Auto classes, to the bit, and without drawing a number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init

from trihybrid.mixers.rwkv7 import Rwkv7
from trihybrid.mixers.tica import Tica
from trihybrid.models.families import register
from trihybrid.models.gemma4 import TrihybridGemma4Config, TrihybridGemma4ForCausalLM, TrihybridGemma4Model

MakeModel = Callable[..., TrihybridGemma4ForCausalLM]
Tokens = Callable[..., Tensor]

CLEAN: dict[str, Any] = {
    "missing_keys": set(),
    "unexpected_keys": set(),
    "mismatched_keys": set(),
    "error_msgs": [],
}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a saved model."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def initialised_while(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Tensor]]:
    """Lists that fill with the mixers whose `initialise` runs, and the tensors that transformers' writers change."""
    mixers: list[str] = []
    written: list[Tensor] = []
    for kind in (Rwkv7, Tica):
        plain = kind.initialise

        def initialise(self: Any, *args: Any, plain: Any = plain) -> None:
            mixers.append(f"{self.publishes}.{self.kind}")
            plain(self, *args)

        monkeypatch.setattr(kind, "initialise", initialise)
    for name in ("copy_", "normal_", "zeros_", "ones_", "constant_"):
        write = getattr(init, name)

        def writer(tensor: Tensor, *args: Any, write: Any = write, **options: Any) -> Any:
            if not getattr(tensor, "_is_hf_initialized", False):
                written.append(tensor)
            return write(tensor, *args, **options)

        monkeypatch.setattr(init, name, writer)
    return mixers, written


def test_auto_classes_load_it_to_the_bit(
    student: MakeModel, tokens: Tokens, layout: str, tmp_path: Path
) -> None:
    model, ids = student(layout), tokens(2, 12)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert type(AutoConfig.from_pretrained(tmp_path)) is TrihybridGemma4Config
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is TrihybridGemma4ForCausalLM
    assert info == CLEAN
    expected = model.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_decoder_alone(student: MakeModel, tokens: Tokens, tmp_path: Path) -> None:
    model, ids = student("tica_everywhere"), tokens(1, 12)
    model.save_pretrained(tmp_path)
    decoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(decoder) is TrihybridGemma4Model
    assert info == CLEAN
    with torch.no_grad():
        assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_registering_twice_is_once() -> None:
    register()
    register()
    assert type(AutoConfig.for_model("trihybrid_gemma4")) is TrihybridGemma4Config


def test_head_stays_tied_and_is_stored_once(student: MakeModel, tmp_path: Path) -> None:
    model = student("tica_everywhere")
    model.save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "model.safetensors"))
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_saved_twice_is_saved_once(student: MakeModel, tmp_path: Path) -> None:
    """The file of a loaded model is the file that it came from, to the byte."""
    student("tica_shared").save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        first, second = (tmp_path / "first" / name).read_bytes(), (tmp_path / "second" / name).read_bytes()
        assert first == second, name


def test_a_change_of_the_default_cache_is_kept(student: MakeModel, tmp_path: Path) -> None:
    model = student("partial")
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).use_cache is False


# Nothing is initialised again


def test_loading_draws_and_writes_nothing(
    student: MakeModel, typical_layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mixer initialises itself, no saved tensor is written after it was read, and the generator stands still."""
    student(typical_layout).save_pretrained(tmp_path)
    mixers, written = initialised_while(monkeypatch)
    before = torch.get_rng_state()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert mixers == []
    saved = {tensor.data_ptr() for tensor in loaded.state_dict().values()}
    assert not saved & {tensor.data_ptr() for tensor in written}


def test_only_missing_tensors_are_initialised(
    student: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without some tensors: those alone are drawn, each as its mixer would (a zero for TICA's output)."""
    model = student("tica_everywhere")
    model.save_pretrained(tmp_path)
    slot = "model.layers.3.self_attn"
    left_out = {
        f"{slot}.tica.o_proj.weight",
        f"{slot}.tica.q_norm.weight",
        f"{slot}.rwkv7.w0",
        f"{slot}.rwkv7.g1",
        f"{slot}.rwkv7.key.weight",
    }
    rewrite(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if name not in left_out})
    mixers, written = initialised_while(monkeypatch)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == left_out
    assert info["unexpected_keys"] == set()
    assert sorted(mixers) == ["3.rwkv7", "3.tica"]
    state = loaded.state_dict()
    by_address = {tensor.data_ptr(): name for name, tensor in state.items()}
    assert {by_address[t.data_ptr()] for t in written if t.data_ptr() in by_address} == left_out
    for name, tensor in model.state_dict().items():
        if name not in left_out:
            assert torch.equal(state[name], tensor), name
    assert not state[f"{slot}.tica.o_proj.weight"].any()
    assert bool((state[f"{slot}.tica.q_norm.weight"] == 1).all())
    assert not state[f"{slot}.rwkv7.g1"].any()
    assert -8 <= float(state[f"{slot}.rwkv7.w0"].min()) < float(state[f"{slot}.rwkv7.w0"].max()) <= 3
    assert 0.01 < float(state[f"{slot}.rwkv7.key.weight"].std()) < 0.03


def test_a_fresh_model_has_no_memory_left_unwritten(
    config: Callable[..., TrihybridGemma4Config], layout: str
) -> None:
    """Fresh memory is full of NaN here."""
    model = TrihybridGemma4ForCausalLM(config(layout))
    for name, tensor in model.state_dict().items():
        assert bool(torch.isfinite(tensor).all()), name
    for name, tensor in model.named_parameters():
        if name.endswith("tica.o_proj.weight"):
            assert not tensor.any()


def test_unexpected_tensors_are_reported(student: MakeModel, tmp_path: Path) -> None:
    student("rwkv7_only").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.1.self_attn.tica.g1": torch.zeros(2)})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {"model.layers.1.self_attn.tica.g1"}


# Buffers and number formats


def test_layer_scalar_is_a_buffer_that_is_saved(student: MakeModel, tmp_path: Path) -> None:
    """Trap: it is no parameter, so optimizers and `parameters()` miss it; of converted layers too."""
    model = student("tica_everywhere")
    scalars = {name: tensor for name, tensor in model.named_buffers() if name.endswith("layer_scalar")}
    assert len(scalars) == 6
    assert all(float(tensor) != 1 for tensor in scalars.values())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in scalars.items():
        assert torch.equal(tensors[name], tensor)
        assert torch.equal(loaded.get_buffer(name), tensor)


def test_rotary_frequencies_are_not_in_the_file(student: MakeModel, tmp_path: Path) -> None:
    student("partial").save_pretrained(tmp_path)
    assert not [
        name for name in load_file(tmp_path / "model.safetensors") if "inv_freq" in name or "rotary" in name
    ]


def test_bfloat16_loading_keeps_rotary_frequencies_in_float32(
    student: MakeModel, tokens: Tokens, tmp_path: Path
) -> None:
    """Trap: bf16 frequencies would turn far positions by a wrong angle."""
    model = student("partial")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    frequencies = {name: b for name, b in model.model.rotary_emb.named_buffers() if "inv_freq" in name}
    assert len(frequencies) == 4
    for name, buffer in frequencies.items():
        kept = loaded.model.rotary_emb.get_buffer(name)
        assert kept.dtype == torch.float32
        assert torch.equal(kept, buffer)
    assert loaded(tokens(1, 4)).logits.dtype == torch.bfloat16


def test_dtype_of_the_file_is_the_default(student: MakeModel, tmp_path: Path) -> None:
    model = student("partial")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
