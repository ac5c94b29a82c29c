"""What a configuration says of a teacher, against the modules that transformers builds from it."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from tiny_gemma4 import base_config
from tiny_teachers import LAYERS, TEACHERS, WINDOW, build_teacher, teacher_config
from trihybrid.models.anatomy import anatomy
from trihybrid.models.families import family_of


def modules(base) -> list[nn.Module]:
    with torch.device("meta"):
        return [layer.self_attn for layer in family_of(base).teacher(base).model.layers]


BASES = {name: lambda name=name, **changes: teacher_config(name, **changes) for name in TEACHERS} | {
    "gemma4": base_config,
    "gemma4-keys-are-values": lambda **changes: base_config(
        attention_k_eq_v=True, num_global_key_value_heads=2, **changes
    ),
}


@pytest.fixture(params=list(BASES))
def base(request):
    return BASES[request.param]()


def test_sizes_are_those_of_the_projections(base) -> None:
    body = anatomy(base)
    for index, (attention, module) in enumerate(zip(body.attentions, modules(base), strict=True)):
        assert module.q_proj.out_features == attention.width == attention.heads * attention.head_dim
        assert module.o_proj.in_features == attention.width
        if attention.owner == index:
            assert module.k_proj.out_features == attention.kv_heads * attention.head_dim
            assert (module.v_proj is None) == (body.keys_are_values and attention.kind == "full")
        else:
            assert not hasattr(module, "k_proj")


def test_scale_and_norms_and_biases_are_those_of_the_module(base) -> None:
    body = anatomy(base)
    for index, module in enumerate(modules(base)):
        assert module.scaling == pytest.approx(body.score_scale, rel=1e-12)
        assert hasattr(module, "q_norm") == (body.norm != "none")
        assert hasattr(module, "v_norm") == (body.value_norm and body.owners[index] == index)
        assert (module.q_proj.bias is not None) == body.input_bias
        assert (module.o_proj.bias is not None) == body.output_bias


def test_a_norms_weight_means_what_the_anatomy_says(base) -> None:
    body = anatomy(base)
    norms = [
        (layer.self_attn.q_norm, layer.self_attn.head_dim)
        for layer in family_of(base).teacher(base).model.layers
        if body.norm != "none"
    ]
    for norm, width in norms:
        x = torch.randn(3, width)
        nn.init.uniform_(norm.weight)
        gain = norm.weight if body.norm == "weight" else 1 + norm.weight
        expected = x / (x.pow(2).mean(-1, keepdim=True) + base.rms_norm_eps).sqrt() * gain
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("name", TEACHERS)
@torch.no_grad()
def test_kinds_and_window_are_what_a_token_sees(name) -> None:
    """A change more than a window back moves a sliding layer's output at no later token, and a full one's it does."""
    teacher = build_teacher(name)
    body = anatomy(teacher.config)
    assert len(body.attentions) == LAYERS
    x_BTD = torch.randn(1, 20, 32)
    other_BTD = x_BTD.clone()
    other_BTD[:, 3] += 1
    outputs: dict[int, list[torch.Tensor]] = {index: [] for index in range(LAYERS)}
    streams = [x_BTD, other_BTD]

    def hear(module, arguments, options):
        """All layers hear the same input, so that only their own reach counts."""
        return arguments, options | {"hidden_states": streams[0]}

    for index, layer in enumerate(teacher.model.layers):
        layer.self_attn.register_forward_pre_hook(hear, with_kwargs=True)
        layer.self_attn.register_forward_hook(
            lambda module, arguments, output, index=index: outputs[index].append(output[0])
        )
    while streams:
        teacher(torch.zeros(1, 20, dtype=torch.long), use_cache=False)
        streams.pop(0)
    for index, attention in enumerate(body.attentions):
        before, after = outputs[index]
        reach = int((before != after).any(-1).nonzero()[:, 1].max())
        assert reach == (19 if attention.kind == "full" else 3 + WINDOW - 1)
        assert attention.kind == "full" or body.window == WINDOW


@torch.no_grad()
def test_the_post_norm_stands_between_attention_and_the_sum(base) -> None:
    """What the rest of the layer starts from is h + y, or h + the post-norm of y."""
    body = anatomy(base)
    layer = family_of(base).teacher(base).model.layers[0]
    h_BTD, y_BTD = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    layer.self_attn.forward = lambda *arguments, **options: (y_BTD, None)
    heard = []
    rest = layer.post_attention_layernorm if body.post_norm is None else layer.pre_feedforward_layernorm
    rest.register_forward_pre_hook(lambda module, arguments: heard.append(arguments[0]))
    layer(h_BTD, torch.zeros(1, 5, 8) if base.model_type == "gemma4_text" else None)
    received = y_BTD if body.post_norm is None else getattr(layer, body.post_norm)(y_BTD)
    assert torch.equal(heard[0], h_BTD + received)


def test_rotary_pairs_are_those_that_turn(base) -> None:
    """Frequencies of zero do not turn."""
    model = family_of(base).teacher(base).model
    position = torch.tensor([[7]])
    for attention in anatomy(base).attentions:
        arguments = (attention.layer_type,) if "gemma" in base.model_type else ()
        _, sine = model.rotary_emb(torch.zeros(1, 1, 1), position, *arguments)
        half = sine.shape[-1] // 2
        assert 2 * half == attention.head_dim
        assert int((sine[0, 0, :half] != 0).sum()) == attention.rotary_pairs


def test_softcap_and_experts() -> None:
    assert anatomy(BASES["gemma3"]()).softcap == 20.0
    assert anatomy(BASES["gemma4"]()).softcap == 30.0
    assert anatomy(BASES["qwen3"]()).softcap is None
    assert anatomy(BASES["qwen3-experts"]()).experts == (4, 2)
    assert anatomy(BASES["llama"]()).experts is None


def test_template_is_the_first_full_attention_or_the_first() -> None:
    assert anatomy(BASES["gemma4"]()).template.head_dim == 32
    assert anatomy(BASES["mistral-windowed"]()).template.kind == "sliding"
    assert anatomy(BASES["qwen3-windowed"]()).template.kind == "full"


@pytest.mark.parametrize(("name", "value"), [("gemma4", "all"), ("gemma3", True)])
def test_attention_in_both_directions_is_refused(name, value) -> None:
    with pytest.raises(ValueError, match=r"use_bidirectional_attention is .*: tokens see later ones"):
        anatomy(BASES[name](use_bidirectional_attention=value))


def test_foreign_families_and_kinds_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r'model_type is "gpt2"; teachers are gemma3_text, gemma4_text, llama'
    ):
        anatomy(GPT2Config())
    with pytest.raises(
        ValueError, match=r'model_type is "gpt2"; teachers are gemma4_text, gemma3_text, llama'
    ):
        family_of(GPT2Config())
    with pytest.raises(
        ValueError, match=r"layer_types holds \['chunked_attention'\]; a teacher's attention is"
    ):
        anatomy(teacher_config("qwen3", layer_types=["chunked_attention"] * LAYERS))
