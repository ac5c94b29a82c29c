"""Hybrids whose retained attention has no positions, as the published ones of the hxa07 family."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trihybrid.models.decoder.families import TrihybridQwen3Config, TrihybridQwen3ForCausalLM
from trihybrid.testing import relative_error

BASE = Qwen3Config(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.4,
)  # fmt: skip
IDS = torch.tensor([[5, 9, 2, 30, 11, 7, 7, 3]])


def student(nope: bool) -> TrihybridQwen3ForCausalLM:
    torch.manual_seed(0)
    return TrihybridQwen3ForCausalLM(TrihybridQwen3Config(base_config=BASE.to_dict(), nope=nope)).eval()


@torch.no_grad()
def logits(model: TrihybridQwen3ForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def test_no_positions_are_frequencies_of_zero() -> None:
    plain, bare = student(False), student(True)
    assert relative_error(logits(bare), logits(plain)) > 1e-2
    plain.model.rotary_emb.inv_freq.zero_()
    assert relative_error(logits(plain), logits(bare)) < 1e-6


def test_the_cache_and_the_saved_configuration_know_of_it(tmp_path) -> None:
    model = student(True)
    model.save_pretrained(tmp_path)
    loaded = TrihybridQwen3ForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.nope is True
    with torch.no_grad():
        first = loaded(IDS[:, :5], use_cache=True)
        cache = first.get("cache", first.get("past_key_values"))
        rest = loaded(IDS[:, 5:], past_key_values=cache).logits
    assert relative_error(torch.cat([first.logits, rest], 1), logits(model)) < 1e-5


def test_a_teachers_layer_in_the_place_of_ours_keeps_its_positions() -> None:
    """A stage runs the teacher's layer through the student's decoder: what it sees is what the teacher saw."""
    model = student(True)
    teacher = Qwen3ForCausalLM(BASE).eval()
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden, stream = model.model.prepare(IDS, layer_types=["full_attention"])
        y = model.model.layer(0, hidden, stream, layer=teacher.model.layers[0])
        expected = teacher.model(IDS, output_hidden_states=True, use_cache=False).hidden_states[1]
    assert relative_error(y, expected) < 1e-6
