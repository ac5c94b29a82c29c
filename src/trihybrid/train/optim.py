"""Optimizers by role: which algorithm, learning rate and weight decay each parameter gets.

AdamW is decoupled (arXiv 1711.05101). Muon (Keller Jordan, 2024: momentum, then the nearest orthogonal matrix
by Newton-Schulz) takes 2-D matrices, with its update scaled by 0.2 sqrt(max(rows, columns)) to AdamW's usual
rms (arXiv 2502.16982), so that one learning rate serves both; on request it has a scale and a rate of its own.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from trihybrid.train.distributed import ALONE, Workers
from trihybrid.train.muon import Muon
from trihybrid.train.rows import NO_ROWS, Rows
from trihybrid.train.section import OptimizerSection, Role

_logger = logging.getLogger(__name__)

ROLES: tuple[str, ...] = get_args(Role)

DEFAULT_MULTIPLIERS: dict[Role, tuple[float, float]] = {
    # The reference that the others are relative to.
    "matrix": (1.0, 1.0),
    # Products of two factors: weight decay keeps the scales of the two from drifting apart.
    "lowrank": (1.0, 1.0),
    # Doubled in RWKV-LM (att.w0): it ranges over several units, and AdamW moves it by about one learning rate a
    # step. No weight decay: zero is one particular decay, not a neutral one.
    "decay": (2.0, 0.0),
    # Gains, biases and mixes: zero is not neutral for them either.
    "vector": (1.0, 0.0),
    # As in RWKV-LM, whose embedding and head decay like its matrices.
    "embedding": (1.0, 1.0),
    "head": (1.0, 1.0),
}
"""Role -> (learning rate multiplier, weight decay multiplier), where the recipe does not say otherwise."""

_COUNTER = "step"  # AdamW's; fused it lies beside the parameter, else on the CPU wherever the parameter lives


class Optimizers:
    """The optimizers of one stage, as one.

    Args:
        parameters: name -> parameter; names and order decide nothing but the names in the saved state.
        optimizers: together they hold each parameter once. Each of their groups carries a `peak` learning
            rate.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
    ) -> None:
        self._parameters = dict(parameters)
        self._optimizers = optimizers
        self._owner = {
            parameter: optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def algorithm(self, name: str) -> str:
        """Which algorithm updates a parameter: "adamw" or "muon"."""
        return type(self._owner[self._parameters[name]]).__name__.lower()

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, factor: float) -> None:
        """Set every group's learning rate to `factor` (in [0, 1]) times its peak."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor

    def set_momentum(self, momentum: float) -> None:
        """Set Muon's momentum, in [0, 1); AdamW's moments keep their rates."""
        for optimizer in self._optimizers:
            if isinstance(optimizer, Muon):
                for group in optimizer.param_groups:
                    group["momentum"] = momentum

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state, "<parameter name>.<state key>" -> tensor (the live one, not a copy), step counters
        included; empty before the first step. Learning rates are no state: they follow from the step.
        """
        state = {}
        for name, parameter in self._parameters.items():
            for key, value in self._owner[parameter].state.get(parameter, {}).items():
                assert isinstance(value, Tensor), f"{name}.{key} is no tensor and would not be saved"
                state[f"{name}.{key}"] = value
        return state

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by copies of these tensors, as `state_tensors` named them, to the bit.

        Raises:
            ValueError: a name, a shape or a dtype does not belong to these parameters and optimizers, or a
                parameter's state is there in part. Nothing is changed then.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in self._parameters:
                raise ValueError(
                    f"optimizer state: {full_name!r} belongs to no trainable parameter; "
                    "load the state of the same stage and model"
                )
            found.setdefault(name, {})[key] = tensor
        for name, state in found.items():
            self._check_state(name, state)
        for name, parameter in self._parameters.items():
            optimizer = self._owner[parameter]
            optimizer.state.pop(parameter, None)
            if name in found:
                fused = bool(optimizer.defaults.get("fused"))
                optimizer.state[parameter] = {
                    key: tensor.detach()
                    .clone()
                    .to("cpu" if key == _COUNTER and not fused else parameter.device)
                    for key, tensor in found[name].items()
                }

    def _check_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        parameter = self._parameters[name]
        keys = {"momentum_buffer"} if self.algorithm(name) == "muon" else {_COUNTER, "exp_avg", "exp_avg_sq"}
        if state.keys() != keys:
            raise ValueError(
                f"optimizer state of {name!r}: wanted {self.algorithm(name)}'s {sorted(keys)}, "
                f"found {sorted(state)}; load the state of the same optimizer"
            )
        for key, tensor in state.items():
            if key == _COUNTER:
                shape, dtype = torch.Size([]), tensor.dtype
            else:
                shape, dtype = parameter.shape, parameter.dtype
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"optimizer state {name}.{key}: wanted {dtype} {list(shape)}, "
                    f"found {tensor.dtype} {list(tensor.shape)}; load the state of the same model"
                )


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    roles: Mapping[str, str],
    section: OptimizerSection,
    workers: Workers = ALONE,
    rows: Mapping[str, Rows] = NO_ROWS,
) -> Optimizers:
    """Give each parameter the algorithm, learning rate and weight decay of its role.

    Args:
        parameters: name -> parameter, float32 or float64 (master weights), each parameter once, at least one.
        roles: name -> role, for exactly these names.
        section: algorithm and hyperparameters.
        workers: those who train together, and share Muon's work.
        rows: parameter name -> its rows, where each worker holds some of them.

    Raises:
        ValueError: names and roles do not match, a role is unknown, a parameter comes twice, does not require
            a gradient or is of a narrower dtype.
    """
    _check(parameters, roles)
    members: dict[tuple[str, Role], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        role = cast(Role, roles[name])
        algorithm = "muon" if section.name == "muon" and role == "matrix" else "adamw"
        if algorithm == "muon" and parameter.ndim != 2:
            algorithm = "adamw"
            _logger.info("optimizer: %s has %d axes; muon takes 2, adamw updates it", name, parameter.ndim)
        members.setdefault((algorithm, role), []).append(parameter)
    groups: dict[str, list[dict[str, Any]]] = {}
    for (algorithm, role), group in members.items():
        rate_default, decay_default = DEFAULT_MULTIPLIERS[role]
        base = section.learning_rate
        if algorithm == "muon" and section.muon.learning_rate is not None:
            base = section.muon.learning_rate
        peak = base * section.learning_rate_by_role.get(role, rate_default)
        decay = section.weight_decay * section.weight_decay_by_role.get(role, decay_default)
        groups.setdefault(algorithm, []).append(
            {"params": group, "lr": peak, "peak": peak, "weight_decay": decay, "role": role}
        )
        _logger.info(
            "optimizer: %s, role %s: %d tensors, %d parameters, learning rate %g, weight decay %g",
            *(algorithm, role, len(group), sum(parameter.numel() for parameter in group), peak, decay),
        )
    optimizers: list[torch.optim.Optimizer] = []
    if "muon" in groups:
        muon = section.muon
        optimizers.append(
            Muon(
                groups["muon"],
                momentum=muon.momentum,
                steps=muon.steps,
                coefficients=muon.coefficients,
                scale=muon.scale,
                normalise_rows=muon.normalise_rows,
                compile=muon.compile,
                workers=workers,
                rows={parameters[name]: found for name, found in rows.items()},
            )
        )
    if "adamw" in groups:
        # One kernel a group, with its counters on the GPU; off the GPU torch chooses.
        fused = True if all(parameter.is_cuda for parameter in parameters.values()) else None
        optimizers.append(
            torch.optim.AdamW(groups["adamw"], betas=section.betas, eps=section.epsilon, fused=fused)
        )
    return Optimizers(parameters, optimizers)


def _check(parameters: Mapping[str, nn.Parameter], roles: Mapping[str, str]) -> None:
    if not parameters:
        raise ValueError("parameters: none to train; make at least one trainable in the stage")
    if parameters.keys() != roles.keys():
        raise ValueError(
            f"roles: without role {sorted(parameters.keys() - roles.keys())}, "
            f"without parameter {sorted(roles.keys() - parameters.keys())}; give each parameter one role"
        )
    seen: dict[int, str] = {}
    for name, parameter in parameters.items():
        if roles[name] not in ROLES:
            raise ValueError(f"roles: {name!r} has role {roles[name]!r}; choose one of {', '.join(ROLES)}")
        if id(parameter) in seen:
            raise ValueError(
                f"parameters: {name!r} is the same as {seen[id(parameter)]!r}; name a shared parameter once"
            )
        seen[id(parameter)] = name
        if not parameter.requires_grad:
            raise ValueError(
                f"parameters: {name!r} does not require a gradient; unfreeze it, or leave it out"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameters: {name!r} is {parameter.dtype}; "
                "keep float32 master weights and cast in the forward"
            )
