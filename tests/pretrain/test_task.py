"""Legend: B batch, T tokens."""

import pytest
import torch
from transformers import Gemma4ForCausalLM

from trihybrid.data import Batch
from trihybrid.pretrain.section import PretrainSection
from trihybrid.pretrain.task import PretrainTask
from trihybrid.testing import relative_error
from trihybrid.train import ROLES, build_optimizer
from trihybrid.train.section import OptimizerSection

VOCABULARY = 61


def model_of(shape: dict, dtype: torch.dtype = torch.float64, **changes: object) -> Gemma4ForCausalLM:
    section = PretrainSection.model_validate({"loop": {"steps": 1}, "shape": shape | changes})
    return Gemma4ForCausalLM(section.configuration(VOCABULARY)).to(dtype)


def batch_of(*lengths: int, rows: int = 2) -> Batch:
    """Rows of documents of the given lengths; the last length counts the token that is only a target."""
    tokens_BT = torch.randint(3, VOCABULARY, (rows, sum(lengths)))
    positions_BT = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    return Batch(tokens_BT, positions_BT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cap", [30.0, 2.0, None])
def test_loss_and_gradients_are_transformers_own(shape, dtype, cap) -> None:
    """On one document, where transformers' shift of the labels is ours. transformers' loss is computed in float32
    whatever the dtype."""
    model = model_of(shape, dtype, final_logit_softcapping=cap)
    batch = batch_of(18)
    expected = model(
        batch.tokens_BT[:, :-1], shift_labels=batch.targets, labels=batch.targets, use_cache=False
    ).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, metrics = PretrainTask(model, chunk=7).loss(batch)
    loss.backward()
    assert metrics == {} and loss.dtype == dtype
    assert relative_error(loss, expected) <= 1e-6
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) <= 1e-5, name


def test_loss_is_the_dense_formula_and_leaves_borders_out(shape) -> None:
    model = model_of(shape)
    batch = batch_of(5, 1, 8)
    logits = model(batch.inputs, position_ids=batch.positions, use_cache=False).logits
    log_p = logits.log_softmax(-1)
    counted = [t for t in range(13) if t + 1 not in (5, 6)]
    rows = [log_p[b, t, batch.tokens_BT[b, t + 1]] for b in range(2) for t in counted]
    loss, _ = PretrainTask(model).loss(batch)
    assert relative_error(loss, -torch.stack(rows).mean()) <= 1e-10


def test_packed_documents_are_separate_documents(shape) -> None:
    model = model_of(shape)
    task = PretrainTask(model)
    whole = batch_of(9, 12)
    parts = [
        Batch(t, p)
        for t, p in zip(whole.tokens_BT.split([9, 12], 1), whole.positions_BT.split([9, 12], 1), strict=True)
    ]
    with torch.no_grad():
        losses = [task.loss(part)[0] for part in parts]
        assert relative_error(task.loss(whole)[0], (8 * losses[0] + 11 * losses[1]) / 19) <= 1e-10


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_roles_cover_all_parameters(shape, tied, name) -> None:
    model = model_of(shape, torch.float32, tie_word_embeddings=tied)
    task = PretrainTask(model)
    roles, parameters = task.roles(), task.parameters()
    assert roles.keys() == parameters.keys() and set(roles.values()) <= set(ROLES)
    assert sum(p.numel() for p in parameters.values()) == model.num_parameters()
    assert roles["model.embed_tokens.weight"] == roles["model.embed_tokens_per_layer.weight"] == "embedding"
    assert roles.get("lm_head.weight") == (None if tied else "head")
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "matrix"
    assert roles["model.layers.0.self_attn.q_norm.weight"] == roles["model.norm.weight"] == "vector"
    build_optimizer(parameters, roles, OptimizerSection(name=name))


def test_tokens_are_inputs(shape) -> None:
    assert PretrainTask(model_of(shape)).tokens(batch_of(5, 8, rows=3)) == 3 * 12


def test_the_weighted_parts_of_a_batch_are_the_batch(shape) -> None:
    """Also where one row has fewer targets than the other."""
    task = PretrainTask(model_of(shape))
    tokens_BT = torch.randint(3, VOCABULARY, (2, 12))
    positions_BT = torch.stack([torch.arange(12), torch.cat([torch.arange(3)] * 4)])
    batch = Batch(tokens_BT, positions_BT)
    parts = task.split(batch, 2)
    weights = [task.weight(part) for part in parts]
    assert weights == [11, 8] and task.weight(batch) == 19
    mean = sum(weight * task.loss(part)[0] for weight, part in zip(weights, parts, strict=True)) / 19
    assert relative_error(mean, task.loss(batch)[0]) <= 1e-10


def test_products_in_bfloat16_leave_loss_and_gradients_in_float32(shape) -> None:
    model = model_of(shape, torch.float32)
    batch = batch_of(12, 7)

    def gradient() -> torch.Tensor:
        parts = [p.grad for p in model.parameters()]
        assert all(part.dtype == torch.float32 for part in parts)
        return torch.cat([part.flatten() for part in parts])

    exact, _ = PretrainTask(model).loss(batch)
    exact.backward()
    expected = gradient()
    model.zero_grad()
    loss, _ = PretrainTask(model, products=torch.bfloat16).loss(batch)
    loss.backward()
    assert loss.dtype == torch.float32 and 0 < relative_error(loss, exact) <= 2e-2
    assert torch.cosine_similarity(gradient(), expected, dim=0) >= 0.98
