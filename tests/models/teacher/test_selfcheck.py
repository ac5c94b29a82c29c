"""A good teacher passes; one with each of the known faults does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM

from trihybrid.models.cache import CACHE
from trihybrid.models.teacher.selfcheck import check_rotary, check_teacher

MakeTeacher = Callable[..., Gemma4ForCausalLM]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_good_teacher_passes_and_is_left_as_it_was(teacher: MakeTeacher, dtype: torch.dtype) -> None:
    model = teacher()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_teacher(model, "good")
    check_rotary(model, "good")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_wrong_cache_is_found(teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share keys and values read those of the new tokens alone, as without the donor's cache."""
    model = teacher()
    shared = model.model.layers[-1].self_attn
    plain = shared.forward

    def forward(*args: Any, shared_kv_states: Any, **options: Any) -> Any:
        length = options["hidden_states"].shape[1]
        cut = {kind: (k[:, :, -length:], v[:, :, -length:]) for kind, (k, v) in shared_kv_states.items()}
        if options[CACHE] is not None:
            options["attention_mask"], shared_kv_states = None, cut
        return plain(*args, shared_kv_states=shared_kv_states, **options)

    monkeypatch.setattr(shared, "forward", forward)
    with pytest.raises(
        ValueError, match=r"^bad: logits with and without a cache differ by .*install another"
    ):
        check_teacher(model, "bad")


def test_a_gradient_that_checkpointing_loses_is_found(
    teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As reentrant checkpointing does it: the loss stays right, the path through shared keys and values is gone."""
    model = teacher()
    shared = model.model.layers[-1].self_attn
    plain = shared.forward

    def forward(*args: Any, shared_kv_states: Any, **options: Any) -> Any:
        if model.model.layers[0].gradient_checkpointing:
            shared_kv_states = {kind: (k.detach(), v.detach()) for kind, (k, v) in shared_kv_states.items()}
        return plain(*args, shared_kv_states=shared_kv_states, **options)

    monkeypatch.setattr(shared, "forward", forward)
    with pytest.raises(ValueError, match=r"^bad: gradients with and without checkpointing differ by"):
        check_teacher(model, "bad")
    assert not model.training and not model.model.layers[0].gradient_checkpointing


def test_rounded_frequencies_are_found(teacher: MakeTeacher) -> None:
    model = teacher().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^bad: .*inv_freq is torch\.bfloat16, must be float32"):
        check_rotary(model, "bad")
