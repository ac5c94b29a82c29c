"""GPTQ: the least-squares rule, never worse than rounding to nearest, and the inputs that it learns from.

Legend: N matrices, R rows, C columns.
"""

import pytest
import torch
from torch import Tensor

from trihybrid.compress.gptq import DAMPING, gptq_round, input_moments, round_to_nearest
from trihybrid.mixers.span import Span, contiguous
from trihybrid.models.compact.model import CompactModel
from trihybrid.models.compact.section import CompactSection
from trihybrid.ops.fake_quantize import row_scales, storable_scales

SECTION = CompactSection(
    hidden_size=16, pattern="TWF", heads=2, kv_heads=1, head_dim=8, rope_dims=4, value_embedding_layers=[2]
)


def problem(rows: int, columns: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [R, C], inputs [4C, C] that are strongly correlated, scales [R] of 4 bits."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(rank or columns, columns, generator=generator) / (rank or columns) ** 0.5
    spread = torch.logspace(0, -1, rank or columns)
    inputs = torch.randn(4 * columns, rank or columns, generator=generator) * spread @ mixing
    return weight_RC, inputs, storable_scales(row_scales(weight_RC, 4, None))


def output_error(weight_RC: Tensor, integers_RC: Tensor, scale_R: Tensor, inputs: Tensor) -> float:
    return (inputs @ (weight_RC - integers_RC * scale_R[:, None]).T).square().sum().item()


def by_least_squares(weight_RC: Tensor, moment_CC: Tensor, scale_R: Tensor, bits: int) -> Tensor:
    """Round a column, then solve for the free columns that keep the outputs nearest; in float64, one by one."""
    weight_RC, moment_CC = weight_RC.double().clone(), moment_CC.double()
    moment_CC = moment_CC + DAMPING * moment_CC.diagonal().mean() * torch.eye(len(moment_CC)).double()
    order = moment_CC.diagonal().argsort(descending=True, stable=True).tolist()
    chosen_RC = torch.zeros(weight_RC.shape, dtype=torch.int8)
    for place, column in enumerate(order):
        chosen_RC[:, column] = round_to_nearest(weight_RC[:, column, None], scale_R, bits)[:, 0]
        error_R = weight_RC[:, column] - chosen_RC[:, column] * scale_R
        free = order[place + 1 :]
        if free:
            answer = torch.linalg.solve(moment_CC[free][:, free], moment_CC[free, column])
            weight_RC[:, free] += error_R[:, None] * answer
    return chosen_RC


@pytest.mark.parametrize(("rows", "columns"), [(4, 12), (2, 150)])
def test_it_is_least_squares_column_by_column(rows: int, columns: int) -> None:
    weight, inputs, scale = problem(rows, columns, seed=columns)
    moment = inputs.T @ inputs
    assert torch.equal(
        gptq_round(weight[None], moment[None], scale[None], 4)[0], by_least_squares(weight, moment, scale, 4)
    )


def test_outputs_are_nearer_than_with_rounding_to_nearest_for_every_seed() -> None:
    ratios = []
    for seed in range(12):
        weight, inputs, scale = problem(24, 48, seed)
        moment = inputs.T @ inputs
        ours = gptq_round(weight[None], moment[None], scale[None], 4)[0]
        nearest = round_to_nearest(weight, scale, 4)
        ratios.append(
            output_error(weight, ours, scale, inputs) / output_error(weight, nearest, scale, inputs)
        )
    assert max(ratios) < 0.4
    assert sum(ratios) / len(ratios) < 0.3


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_uncorrelated_inputs_leave_rounding_to_nearest(spread: float) -> None:
    weight, _, scale = problem(7, 140, seed=3)
    moment = torch.diag(torch.exp(spread * torch.linspace(-1, 1, 140)))
    ours = gptq_round(weight[None], moment[None], scale[None], 4)[0]
    assert torch.equal(ours, round_to_nearest(weight, scale, 4))


def test_matrices_of_a_batch_do_not_meet() -> None:
    parts = [problem(5, 20, seed) for seed in range(3)]
    weight_NRC, scale_NR = torch.stack([part[0] for part in parts]), torch.stack([part[2] for part in parts])
    moment_NCC = torch.stack([part[1].T @ part[1] for part in parts])
    together = gptq_round(weight_NRC, moment_NCC, scale_NR, 4)
    for index in range(3):
        alone = slice(index, index + 1)
        assert torch.equal(
            together[alone], gptq_round(weight_NRC[alone], moment_NCC[alone], scale_NR[alone], 4)
        )


def test_dead_columns_and_too_few_inputs_are_no_trouble() -> None:
    weight, inputs, scale = problem(6, 32, seed=5, rank=3)
    inputs[:, 10:20] = 0
    moment = inputs.T @ inputs
    chosen = gptq_round(weight[None], moment[None], scale[None], 4)[0]
    nearest = round_to_nearest(weight, scale, 4)
    assert torch.equal(chosen[:, 10:20], nearest[:, 10:20])
    assert output_error(weight, chosen, scale, inputs) < 0.2 * output_error(weight, nearest, scale, inputs)
    nothing = gptq_round(weight[None], torch.zeros_like(moment)[None], scale[None], 4)[0]
    assert torch.equal(nothing, nearest)


def test_inputs_that_are_not_finite_are_refused() -> None:
    weight, inputs, scale = problem(3, 4, seed=0)
    moment = inputs.T @ inputs
    moment[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        gptq_round(weight[None], moment[None], scale[None], 4)


@pytest.fixture
def model() -> CompactModel:
    torch.manual_seed(0)
    model = CompactModel(SECTION, 40)
    model.initialise()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def blocks(count: int) -> list[tuple[Tensor, Span]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(40, (2, 9), generator=generator), contiguous(2, 9)) for _ in range(count)]


def test_moments_are_those_of_what_every_projection_saw(model: CompactModel) -> None:
    seen: dict[str, list[Tensor]] = {name: [] for name in model.projections()}
    handles = [
        module.register_forward_hook(
            lambda _, inputs, __, name=name: seen[name].append(inputs[0].flatten(0, -2))
        )
        for name, module in model.projections().items()
    ]
    for tokens, span in blocks(3):
        model.hidden(tokens, span)
    for handle in handles:
        handle.remove()
    moments = input_moments(model, blocks(3), 54)
    assert set(moments) == set(seen)
    for name, moment in moments.items():
        inputs = torch.cat(seen[name]).double()
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, inputs.T @ inputs, rtol=1e-5, atol=1e-5)


def test_no_more_is_read_than_was_asked_for(model: CompactModel) -> None:
    few = input_moments(model, blocks(5), 19)
    assert all(torch.equal(few[name], moment) for name, moment in input_moments(model, blocks(2), 36).items())


def test_the_model_is_left_without_hooks_also_after_an_error(model: CompactModel) -> None:
    model.train()
    with pytest.raises(IndexError):
        input_moments(model, [(torch.full((1, 3), 40), contiguous(1, 3))], 100)
    input_moments(model, blocks(1), 100)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_text_is_an_error(model: CompactModel) -> None:
    with pytest.raises(ValueError, match="no batch"):
        input_moments(model, [], 100)


def test_a_projection_that_saw_nothing_is_named(model: CompactModel) -> None:
    model.unused = type(model.blocks[0].mlp.up)(4, 4)
    with pytest.raises(ValueError, match=r"unused \(1 in all\) saw no input"):
        input_moments(model, blocks(1), 100)
