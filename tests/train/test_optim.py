"""Each role gets its algorithm, learning rate and weight decay; the state survives a file to the bit."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from trihybrid.train import DEFAULT_MULTIPLIERS, ROLES, OptimizerSection, build_optimizer


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


def one_of_each() -> dict[str, nn.Parameter]:
    return {f"layer.{role}": parameter(4, 4) for role in ROLES}


def roles_of(parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    return {name: name.rpartition(".")[2] for name in parameters}


def step(parameters: dict[str, nn.Parameter], optimizers, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in parameters.values():
        tensor.grad = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
    optimizers.step()


def test_default_table_names_every_role_and_never_decays_decay_or_vector() -> None:
    assert set(DEFAULT_MULTIPLIERS) == set(ROLES)
    assert {role for role, (_, decay) in DEFAULT_MULTIPLIERS.items() if decay == 0.0} == {"decay", "vector"}
    assert DEFAULT_MULTIPLIERS["decay"][0] == 2.0


def test_weight_decay_and_learning_rate_by_role_as_numbers() -> None:
    """With a zero gradient AdamW moves a parameter by -learning rate * weight decay * value, nothing else."""
    parameters = one_of_each()
    section = OptimizerSection(
        learning_rate=0.1,
        weight_decay=0.5,
        learning_rate_by_role={"head": 3.0},
        weight_decay_by_role={"lowrank": 0.1},
    )
    optimizers = build_optimizer(parameters, roles_of(parameters), section)
    for tensor in parameters.values():
        tensor.grad = torch.zeros_like(tensor)
    optimizers.set_learning_rate(0.5)
    optimizers.step()
    wanted = {
        "matrix": 1 - 0.05 * 0.5,
        "lowrank": 1 - 0.05 * 0.05,
        "decay": 1.0,
        "vector": 1.0,
        "embedding": 1 - 0.05 * 0.5,
        "head": 1 - 0.15 * 0.5,
    }
    found = {name.rpartition(".")[2]: tensor[0, 0].item() for name, tensor in parameters.items()}
    assert found == pytest.approx(wanted, rel=1e-6)


def test_first_adamw_step_is_one_learning_rate() -> None:
    """m / sqrt(v) is the gradient's sign at the first step, after bias correction."""
    parameters = {"a.vector": parameter(3), "b.decay": parameter(3)}
    optimizers = build_optimizer(parameters, roles_of(parameters), OptimizerSection(learning_rate=0.01))
    for tensor in parameters.values():
        tensor.grad = torch.tensor([2.0, -3.0, 0.5])
    optimizers.step()
    assert parameters["a.vector"].tolist() == pytest.approx([0.99, 1.01, 0.99], rel=1e-6)
    assert parameters["b.decay"].tolist() == pytest.approx([0.98, 1.02, 0.98], rel=1e-6)


def test_muon_takes_two_axis_matrices_only() -> None:
    parameters = {**one_of_each(), "stack.matrix": parameter(2, 4, 4), "bias.vector": parameter(4)}
    optimizers = build_optimizer(parameters, roles_of(parameters), OptimizerSection(name="muon"))
    algorithms = {name: optimizers.algorithm(name) for name in parameters}
    assert [name for name, algorithm in algorithms.items() if algorithm == "muon"] == ["layer.matrix"]
    assert set(algorithms.values()) == {"muon", "adamw"}
    step(parameters, optimizers)
    state = optimizers.state_tensors()
    assert [name for name in state if name.startswith("layer.matrix.")] == ["layer.matrix.momentum_buffer"]


def test_muon_update_has_the_rms_of_adamw() -> None:
    """0.2 sqrt(max(rows, columns)) times an orthogonal matrix has rms 0.2 in each entry (arXiv 2502.16982,
    section 2.2); Newton-Schulz leaves singular values between about 0.7 and 1.2.
    """
    parameters = {"w.matrix": nn.Parameter(torch.zeros(24, 64))}
    section = OptimizerSection(name="muon", learning_rate=0.01)
    step(parameters, build_optimizer(parameters, roles_of(parameters), section))
    rms = parameters["w.matrix"].detach().square().mean().sqrt().item()
    assert 0.7 * 0.2 * 0.01 < rms < 1.2 * 0.2 * 0.01


@pytest.mark.parametrize("name", ["adamw", "muon"])
@settings(deadline=None, max_examples=15, derandomize=True)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), before=st.integers(1, 3), seed=st.integers(0, 99))
def test_state_survives_a_file_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: int, columns: int, before: int, seed: int
) -> None:
    file = tmp_path_factory.mktemp("state") / "state.safetensors"

    def build():
        parameters = {"w.matrix": parameter(rows, columns), "b.vector": parameter(columns)}
        return parameters, build_optimizer(parameters, roles_of(parameters), OptimizerSection(name=name))

    parameters, optimizers = build()
    for number in range(before):
        step(parameters, optimizers, seed + number)
    save_file(optimizers.state_tensors(), file)
    others, other_optimizers = build()
    other_optimizers.load_state_tensors(load_file(file))
    assert other_optimizers.state_tensors()["b.vector.step"].item() == before
    with torch.no_grad():
        for key, tensor in parameters.items():
            others[key].copy_(tensor)
    step(parameters, optimizers, seed + 50)
    step(others, other_optimizers, seed + 50)
    assert all(torch.equal(tensor, others[key]) for key, tensor in parameters.items())
    state, other_state = optimizers.state_tensors(), other_optimizers.state_tensors()
    assert state.keys() == other_state.keys()
    assert all(torch.equal(tensor, other_state[key]) for key, tensor in state.items())


def test_loaded_state_is_a_copy() -> None:
    parameters = one_of_each()
    optimizers = build_optimizer(parameters, roles_of(parameters), OptimizerSection())
    step(parameters, optimizers)
    kept = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    optimizers.load_state_tensors(kept)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    step(parameters, optimizers, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())


def test_state_that_does_not_belong_is_refused_and_changes_nothing() -> None:
    parameters = one_of_each()
    adamw = build_optimizer(parameters, roles_of(parameters), OptimizerSection())
    step(parameters, adamw)
    state = {name: tensor.clone() for name, tensor in adamw.state_tensors().items()}
    muon = build_optimizer(parameters, roles_of(parameters), OptimizerSection(name="muon"))
    with pytest.raises(ValueError, match=r"'layer.matrix': wanted muon's \['momentum_buffer'\], found"):
        muon.load_state_tensors(state)
    with pytest.raises(ValueError, match=r"'ghost.step' belongs to no trainable parameter"):
        adamw.load_state_tensors({**state, "ghost.step": torch.tensor(1.0)})
    part = {name: tensor for name, tensor in state.items() if name != "layer.head.exp_avg"}
    with pytest.raises(ValueError, match=r"'layer.head': wanted adamw's .*found \['exp_avg_sq', 'step'\]"):
        adamw.load_state_tensors(part)
    with pytest.raises(ValueError, match=r"layer.head.exp_avg: wanted .* \[4, 4\], found .* \[2\]"):
        adamw.load_state_tensors({**state, "layer.head.exp_avg": torch.zeros(2)})
    assert muon.state_tensors() == {}
    assert all(torch.equal(tensor, state[name]) for name, tensor in adamw.state_tensors().items())


@pytest.mark.parametrize(
    ("parameters", "roles", "match"),
    [
        ({}, {}, "none to train"),
        ({"a": parameter(1)}, {"b": "vector"}, r"without role \['a'\], without parameter \['b'\]"),
        ({"a": parameter(1)}, {"a": "bias"}, "'a' has role 'bias'; choose one of matrix, lowrank, decay"),
        ({"a": parameter(1, dtype=torch.bfloat16)}, {"a": "vector"}, "'a' is torch.bfloat16; keep float32"),
        ({"a": nn.Parameter(torch.ones(1), requires_grad=False)}, {"a": "vector"}, "'a' does not require"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict, roles: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_optimizer(parameters, roles, OptimizerSection())


def test_shared_parameter_is_named_once() -> None:
    shared = parameter(2, 2)
    with pytest.raises(ValueError, match="'head' is the same as 'embedding'"):
        build_optimizer(
            {"embedding": shared, "head": shared},
            {"embedding": "embedding", "head": "head"},
            OptimizerSection(),
        )


def test_names_of_the_state_are_those_of_the_parameters(tiny: ModuleType, tmp_path: Path) -> None:
    task = tiny.TinyTask()
    optimizers = build_optimizer(task.parameters(), task.roles(), OptimizerSection())
    assert optimizers.state_tensors() == {}
    task.loss(tiny.batch_of(0))[0].backward()
    optimizers.step()
    wanted = {f"{name}.{key}" for name in task.parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(optimizers.state_tensors()) == wanted
