"""The task of a compact model. Legend: B batch, T tokens."""

import functools

import pytest
import torch
from torch import Tensor

from trihybrid.data import Batch
from trihybrid.mixers.span import contiguous
from trihybrid.models.compact import CompactModel, CompactSection
from trihybrid.ops.fake_quantize import fake_quantize
from trihybrid.pretrain.compact import CompactTask
from trihybrid.pretrain.compact_section import CompactTrainSection
from trihybrid.testing import relative_error
from trihybrid.train import ROLES, build_optimizer
from trihybrid.train.section import OptimizerSection

VOCABULARY = 61


def task_of(dtype: torch.dtype = torch.float64, **fields: object) -> CompactTask:
    """Every kind of look-back, with parameters away from their start, so that each counts."""
    section = CompactSection(
        hidden_size=16, pattern="TWF", heads=2, kv_heads=1, head_dim=8, rope_dims=4, bigram_buckets=32,
        bigram_width=8, value_embedding_width=8, value_embedding_layers=[2], mlp_ratio=2.0,
        legend={"T": "token_shift", "W": {"mixer": "sliding", "window": 3}, "F": {"mixer": "full", "xsa": True}},
    )  # fmt: skip
    model = CompactModel(section, VOCABULARY)
    torch.manual_seed(1)
    model.initialise()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype)
    model.enable_fake_quantise({"matrix": 6}, None)
    return CompactTask(model, CompactTrainSection.model_validate({"loop": {"steps": 1}, **fields}))


def batch_of(*lengths: int, rows: int = 2) -> Batch:
    """Rows of documents of these lengths, each after a BOS (2); the last token is only a target."""
    tokens_BT = torch.randint(3, VOCABULARY, (rows, sum(lengths)))
    positions_BT = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    return Batch(tokens_BT.masked_fill(positions_BT == 0, 2), positions_BT)


def gradients(task: CompactTask, loss: Tensor) -> dict[str, Tensor]:
    task.model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in task.parameters().items()}


def test_every_token_but_the_first_is_a_target() -> None:
    task, batch = task_of(), batch_of(5, 1, 8)
    log_p = task.model(batch.inputs, position_ids=batch.positions).logits.log_softmax(-1)
    terms = [log_p[b, t, batch.tokens_BT[b, t + 1]] for b in range(2) for t in range(13)]
    loss, metrics = task.loss(batch)
    assert metrics == {} and loss.dtype == torch.float64
    assert relative_error(loss, -torch.stack(terms).mean()) <= 1e-10


def test_documents_of_a_row_do_not_see_each_other_unless_they_leak() -> None:
    batch = batch_of(6, 7)
    task, leaky = task_of(), task_of(leak=True)
    changed = Batch(batch.tokens_BT.clone(), batch.positions_BT)
    changed.tokens_BT[:, 5] = 3 + (changed.tokens_BT[:, 5] - 2) % (VOCABULARY - 3)
    later_BT = batch.tokens_BT[:, 7:]
    losses = {}
    for name, which in (("own", task), ("leak", leaky)):
        hidden = []
        for made in (batch, changed):
            span = contiguous(2, 12) if which.leak else None
            logits = (
                which.model(made.inputs, position_ids=made.positions).logits
                if span is None
                else which.model.logits(which.model.hidden(made.inputs, span)[0])
            )
            whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), made.next_tokens.flatten())
            assert relative_error(which.loss(made)[0], whole) <= 1e-10
            hidden.append(logits[:, 6:].log_softmax(-1).gather(-1, later_BT[..., None]))
        losses[name] = (hidden[0] - hidden[1]).abs().max().item()
    assert losses["own"] == 0.0 and losses["leak"] > 1e-4


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_make_the_whole(parts: int) -> None:
    task, batch = task_of(), batch_of(4, 9, rows=4)
    whole, _ = task.loss(batch)
    expected = gradients(task, whole)
    assert task.tokens(batch) == 4 * 12
    pieces = task.split(batch, parts)
    assert [piece.inputs.shape for piece in pieces] == [(4 // parts, 12)] * parts
    mean = sum(task.loss(piece)[0] for piece in pieces) / parts
    assert relative_error(mean, whole) <= 1e-10
    found = gradients(task, mean)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= 1e-10, name


def test_quantisation_is_switched_on_by_progress_alone() -> None:
    task, batch = task_of(torch.float32, quantise_from=0.75), batch_of(5, 8)
    plain = task.loss(batch)[0].item()
    rounded = task_of(torch.float32)
    with torch.no_grad():
        for projection in rounded.model.projections().values():
            projection.weight.copy_(fake_quantize(projection.weight, 6, None, None))
    expected = rounded.loss(batch)[0].item()
    assert abs(expected - plain) > 1e-4
    for fraction, wanted in ((0.0, plain), (0.74, plain), (0.75, expected), (1.0, expected), (0.5, plain)):
        task.at(fraction, 7)
        assert task.loss(batch)[0].item() == pytest.approx(wanted, rel=1e-6)
    never = task_of(torch.float32)
    never.at(1.0, 7)
    assert never.loss(batch)[0].item() == pytest.approx(plain, rel=1e-6)


def test_a_compiled_loss_is_one_graph_that_obeys_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(5, 8)
    eager = task_of(torch.float32, quantise_from=0.5)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count, fullgraph=True))
    task = task_of(torch.float32, quantise_from=0.5, compile=True)
    losses = []
    for fraction in (0.0, 1.0, 0.0):
        for each in (task, eager):
            each.at(fraction, 0)
        losses.append(task.loss(batch)[0].item())
        assert losses[-1] == pytest.approx(eager.loss(batch)[0].item(), rel=1e-5)
    assert len(graphs) == 1
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_roles_cover_all_parameters(name: str) -> None:
    task = task_of(torch.float32)
    roles, parameters = task.roles(), task.parameters()
    assert roles.keys() == parameters.keys() and set(roles.values()) <= set(ROLES)
    build_optimizer(parameters, roles, OptimizerSection(name=name))


def test_a_share_of_the_gradient_is_added_with_and_without_asking_for_a_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = batch_of(5, 8)
    plain = task_of()
    wanted = gradients(plain, plain.loss(batch)[0])
    with caplog.at_level("INFO"):
        asked = task_of(graph=True)
    assert "without effect on cpu" in caplog.text
    for task in (plain, asked):
        task.model.zero_grad()
        for _ in range(2):
            loss, _ = task.differentiate(batch, 0.25)
            assert not loss.requires_grad
        for name, parameter in task.parameters().items():
            assert relative_error(parameter.grad, 0.5 * wanted[name]) <= 1e-10
