"""The running average of the parameters (EMA), without a lag at its beginning.

After the n-th update that counts, with parameters p_1 ... p_n and decays d_1 ... d_n,

    s_n = 1 + d_n s_(n-1),  s_0 = 0
    average_n = average_(n-1) + (p_n - average_(n-1)) / s_n

so that p_i weighs as d_(i+1) ... d_n, and all weights sum to one: the initial parameters are not in it. With one
decay d, 1 / s_n = (1 - d) / (1 - d^n), Adam's bias correction (arXiv 1412.6980, section 3); with d = 1 it is the
plain mean of all steps. A horizon h asks for d = 1 - 1 / max(1, h N), N being the steps of the run: about the last
h N steps count.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trihybrid.train.section import AverageSection

_PREFIX = "average."
_TOTAL = "total"


class Average:
    """Follows some parameters.

    Args:
        parameters: name -> parameter; the average has their dtypes and devices.
        section: decay or horizon, and where the average begins.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], section: AverageSection) -> None:
        self._parameters = dict(parameters)
        self._section = section
        self._averages: list[Tensor] = []
        self._total = 0.0

    @property
    def started(self) -> bool:
        """Whether there is an average yet."""
        return bool(self._averages)

    @torch.no_grad()
    def update(self, fraction: float, steps: int) -> None:
        """Take the parameters in, after a step.

        Args:
            fraction: of the run that was done before that step, in [0, 1]; below `start_fraction` nothing happens.
            steps: expected steps of the run, for a horizon.
        """
        if fraction < self._section.start_fraction and not self.started:
            return
        parameters = [parameter.detach() for parameter in self._parameters.values()]
        self._total = 1.0 + self.decay(steps) * self._total
        if not self.started:
            self._averages = [parameter.clone() for parameter in parameters]
        else:
            torch._foreach_lerp_(self._averages, parameters, 1.0 / self._total)

    def decay(self, steps: int) -> float:
        """The factor of the past in a run of that many steps, in [0, 1]."""
        if self._section.decay is not None:
            return self._section.decay
        assert self._section.horizon is not None
        return 1.0 - 1.0 / max(1.0, self._section.horizon * steps)

    @torch.no_grad()
    def apply(self) -> None:
        """Overwrite the parameters by their averages; there must be some."""
        assert self.started
        torch._foreach_copy_([parameter.detach() for parameter in self._parameters.values()], self._averages)

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state: "average.<parameter name>" -> tensor (the live one), and "total", s_n in float64; empty
        before the start.
        """
        if not self.started:
            return {}
        state = {
            f"{_PREFIX}{name}": tensor for name, tensor in zip(self._parameters, self._averages, strict=True)
        }
        return {**state, _TOTAL: torch.tensor(self._total, dtype=torch.float64)}

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Say whether a state, as `state_tensors` named it, belongs to these parameters.

        Raises:
            ValueError: a name, a shape or a dtype does not.
        """
        if not tensors:
            return
        wanted = {f"{_PREFIX}{name}": parameter for name, parameter in self._parameters.items()}
        cure = "load the state of the same stage and model"
        if tensors.keys() != wanted.keys() | {_TOTAL}:
            raise ValueError(
                f"average: lacks {sorted((wanted.keys() | {_TOTAL}) - tensors.keys())}, "
                f"holds besides {sorted(tensors.keys() - wanted.keys() - {_TOTAL})}; {cure}"
            )
        for name, parameter in wanted.items():
            tensor = tensors[name]
            if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
                raise ValueError(
                    f"average: {name!r}: wanted {parameter.dtype} {list(parameter.shape)}, "
                    f"found {tensor.dtype} {list(tensor.shape)}; {cure}"
                )

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by copies of these tensors, to the bit.

        Raises:
            ValueError: as `check_state`; nothing is changed then.
        """
        self.check_state(tensors)
        self._total = tensors[_TOTAL].item() if tensors else 0.0
        self._averages = [
            tensors[f"{_PREFIX}{name}"].detach().clone().to(parameter.device)
            for name, parameter in (self._parameters.items() if tensors else ())
        ]
