"""The model over a source against transformers' own over the same tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM

from trihybrid.models.teacher.source import ModelSource
from trihybrid.models.teacher.streamed import streamed_model

MakeTeacher = Callable[..., Gemma4ForCausalLM]
SHAPES: dict[str, dict[str, Any]] = {
    "E2B": {},
    "without per-layer inputs": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "keys are values": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0},
    "experts": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
}
CASES = [
    (shape, dtype)
    for shape in SHAPES
    for dtype in (torch.float32, torch.float64)
    # torch's grouped product of experts takes no float64.
    if (shape, dtype) != ("experts", torch.float64)
]


@torch.no_grad()
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_hidden_states_are_transformers_own_to_the_bit(
    teacher: MakeTeacher, tokens: Callable[..., Tensor], shape: str, dtype: torch.dtype
) -> None:
    model = teacher(**SHAPES[shape])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids_BT = tokens(2, 20)
    positions_BT = torch.cat([torch.arange(12), torch.arange(8)])[None].expand(2, -1)
    streamed = streamed_model(model.config, ModelSource(model), dtype)
    found, wanted = (
        m(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
        for m in (streamed, model.model)
    )
    assert found.dtype == dtype and torch.equal(found, wanted)
    # No layer holds anything afterwards, and the source is as it was.
    assert all(parameter.is_meta for layer in streamed.layers for parameter in layer.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_bfloat16_teacher_is_computed_in_float32(
    teacher: MakeTeacher, tokens: Callable[..., Tensor]
) -> None:
    model = teacher()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    streamed = streamed_model(model.config, ModelSource(model), torch.float32)
    found = streamed(input_ids=tokens(1, 12), use_cache=False).last_hidden_state
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    assert torch.equal(found, model.model(input_ids=tokens(1, 12), use_cache=False).last_hidden_state)


@torch.no_grad()
def test_a_layer_that_fails_is_unloaded_too(teacher: MakeTeacher, tokens: Callable[..., Tensor]) -> None:
    model = teacher()
    streamed = streamed_model(model.config, ModelSource(model), torch.float32)

    def fail(*_: object) -> None:
        raise KeyError

    streamed.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError):
        streamed(input_ids=tokens(1, 12), use_cache=False)
    assert all(parameter.is_meta for layer in streamed.layers for parameter in layer.parameters())


@torch.no_grad()
def test_a_source_that_lacks_a_tensor_is_refused(teacher: MakeTeacher, tokens: Callable[..., Tensor]) -> None:
    model = teacher()
    source = ModelSource(model)
    name = "model.layers.3.mlp.up_proj.weight"
    good = source._tensors.pop(name)
    with pytest.raises(ValueError, match=rf"the teacher has no tensor {name}"):
        streamed_model(model.config, source, torch.float32)(input_ids=tokens(1, 12), use_cache=False)
    source._tensors[name] = good[1:]
    with pytest.raises(
        ValueError, match=rf"{name} has the shape \[47, 32\], its configuration says \[48, 32\]"
    ):
        streamed_model(model.config, source, torch.float32)(input_ids=tokens(1, 12), use_cache=False)
