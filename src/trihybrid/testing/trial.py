"""One trial of a mixer: build it, run it in one block or many, and compare.

Legend: B batch, T time, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trihybrid.mixers.contract import Mixer, Shared
from trihybrid.mixers.span import Span, contiguous
from trihybrid.mixers.state import State
from trihybrid.testing.compare import TOLERANCE, relative_error

BATCH, LENGTH = 2, 21

Build = Callable[[torch.dtype, int], Mixer]
States = Sequence[State | None]


class LawBroken(AssertionError):
    """A mixer does not obey a law. The message names law, subject, dtype, what differs and by how much."""


@dataclass(frozen=True)
class Subject:
    """A mixer on trial.

    Attributes:
        name: for messages.
        build: (dtype, seed) -> the mixer, its parameters random (see `randomise`) and of that dtype.
        width: model width D of its inputs.
        donor: builds the mixer whose keys and values the subject reads, if it reads any. It runs first, on the same
            input, and its state and gradients are held to the laws too.
        reference: builds the same mixer on the backend that defines it, if `build` chooses another.
        float32_inside: whether parts of it run in float32 whatever the dtype, as transformers' norms do. Its float64
            gradients are then held to the tolerance of float32.
        document_state: whether the state after a block depends on the last document alone (a recurrence). A store of
            keys and values also holds earlier documents and padding, which are merely invisible.
        device: where the trial runs; what `build` returns is moved there.
    """

    name: str
    build: Build
    width: int
    donor: Build | None = None
    reference: Build | None = None
    float32_inside: bool = False
    document_state: bool = False
    device: str = "cpu"


def randomise(mixer: Mixer, seed: int) -> Mixer:
    """Overwrite every parameter, in place, so that no branch of a mixer is silent: matrices with variance
    2 / (rows + columns), decays around -2, other vectors around 1. Returns the mixer."""
    generator = torch.Generator().manual_seed(seed)
    roles = mixer.roles()
    with torch.no_grad():
        for name, parameter in sorted(mixer.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (2 / sum(parameter.shape)) ** 0.5)
            else:
                parameter.copy_(noise - 2 if roles.get(name) == "decay" else 1 + 0.3 * noise)
    return mixer


class Trial:
    """A subject in one dtype with its inputs; runs it, and raises `LawBroken` with the law and the number.

    Args:
        law: name of the law, for messages.
        build: what builds the mixer, `subject.build` by default.

    Attributes:
        mixers: the donor (if any) and the mixer.
        x_BTD: inputs [BATCH, LENGTH, D] of unit variance, exact in bfloat16.
    """

    def __init__(self, law: str, subject: Subject, dtype: torch.dtype, build: Build | None = None) -> None:
        self.title = f"{law}: {subject.name} in {str(dtype).removeprefix('torch.')}"
        self.device = subject.device
        self.tolerance = TOLERANCE[dtype]
        loose = TOLERANCE[torch.float32] if subject.float32_inside else 0.0
        self.gradient_tolerance = max(self.tolerance, loose)
        donors = [] if subject.donor is None else [subject.donor(dtype, 1)]
        self.mixers = [mixer.to(subject.device) for mixer in [*donors, (build or subject.build)(dtype, 0)]]
        noise_BTD = torch.randn(BATCH, LENGTH, subject.width, generator=torch.Generator().manual_seed(2))
        self.x_BTD = noise_BTD.to(torch.bfloat16).to(subject.device, dtype)

    def span(self, length: int, start: int = 0, batch: int = BATCH) -> Span:
        """`length` tokens of one document a row, after `start` others."""
        return contiguous(batch, length, start, self.device)

    def run(
        self, x_BTD: Tensor, span: Span, states: States | None = None, recompute: bool = False
    ) -> tuple[Tensor, list[State | None]]:
        """The output of the mixer, [B, T, D], and the states of donor and mixer, which are given the same x."""
        shared = Shared()
        after: list[State | None] = []
        y_BTD = x_BTD
        for mixer, state in zip(self.mixers, states or [None] * len(self.mixers), strict=True):
            given: tuple[Any, ...] = (x_BTD, span, state, shared)
            y_BTD, state = checkpoint(mixer, *given, use_reentrant=False) if recompute else mixer(*given)
            after.append(state)
        return y_BTD, after

    def run_blocks(
        self, x_BTD: Tensor, sizes: list[int], span: Callable[[int, int], Span]
    ) -> tuple[Tensor, list[State | None]]:
        """Like `run`, from new states, in blocks of these sizes; `span(a, b)` is the span of tokens a to b."""
        states: States = [mixer.new_state(x_BTD.shape[0], self.device, x_BTD.dtype) for mixer in self.mixers]
        outputs, start = [], 0
        for size in sizes:
            y, states = self.run(x_BTD[:, start : start + size], span(start, start + size), states)
            outputs.append(y)
            start += size
        return torch.cat(outputs, 1), list(states)

    def gradients(self, leaf_BTD: Tensor, y_BTD: Tensor, states: States = ()) -> dict[str, Tensor]:
        """Gradients of the input and of every parameter, of a randomly weighted sum of squares of outputs and states.

        The weights depend on the last dimension alone, so that losses of documents add up to that of the packed row.
        """
        generator = torch.Generator().manual_seed(3)
        stored = [t for state in states if state is not None for t in state.tensors().values()]
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for tensor in [y_BTD, *(t for t in stored if t.is_floating_point())]:
            weights = torch.randn(tensor.shape[-1], generator=generator, dtype=torch.float64).to(self.device)
            loss = loss + (tensor.double().square() * weights).sum()
        named = {"input": leaf_BTD}
        for place, mixer in zip(("donor ", "")[-len(self.mixers) :], self.mixers, strict=True):
            named |= {place + name: parameter for name, parameter in mixer.named_parameters()}
        # A donor's output is not read, so the parameters behind it have no gradient.
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        return dict(zip(named, gradients, strict=True))

    def require(self, holds: bool, complaint: str) -> None:
        """Raise `LawBroken` with the complaint unless it holds."""
        if not holds:
            raise LawBroken(f"{self.title}: {complaint}")

    def same(self, what: str, x: Tensor, reference: Tensor, tolerance: float | None = None) -> None:
        """Require that x equals the reference within a tolerance, that of the dtype by default."""
        tolerance = self.tolerance if tolerance is None else tolerance
        shapes = f"{tuple(x.shape)}, not {tuple(reference.shape)}"
        self.require(x.shape == reference.shape, f"{what} has shape {shapes}")
        error = relative_error(x, reference)
        self.require(error <= tolerance, f"{what} differs by {error:.2e}, allowed {tolerance:.0e}")

    def bits(self, what: str, x: Tensor, reference: Tensor) -> None:
        """Require equality to the bit."""
        error = relative_error(x, reference) if x.shape == reference.shape else float("inf")
        self.require(torch.equal(x, reference), f"{what} differs by {error:.2e}, it must be equal to the bit")

    def same_states(self, states: States, references: States, bits: bool = False) -> None:
        """Require equal states, tensor by tensor."""
        compare = self.bits if bits else self.same
        for state, reference in zip(states, references, strict=True):
            self.require((state is None) == (reference is None), f"state is {state}, not {reference}")
            if state is not None and reference is not None:
                for name, tensor in reference.tensors().items():
                    compare(f"state {name}", state.tensors()[name], tensor)

    def same_gradients(self, gradients: dict[str, Tensor], references: dict[str, Tensor]) -> None:
        """Require that every gradient in the references is met."""
        for name, reference in references.items():
            self.same(f"gradient of {name}", gradients[name], reference, self.gradient_tolerance)


def through_bytes(state: State | None) -> State | None:
    """The state after a round trip through safetensors, in memory."""
    if state is None:
        return None
    data = save({name: tensor.contiguous().clone() for name, tensor in state.tensors().items()})
    restored = load(data)
    return type(state).restore({name: restored[name].to(t.device) for name, t in state.tensors().items()})


def one_row(state: State | None, row: int) -> State | None:
    """The state of one row of the batch."""
    if state is None:
        return None
    tensors = state.tensors().items()
    return type(state).restore({name: t[row : row + 1] if t.dim() else t for name, t in tensors})
