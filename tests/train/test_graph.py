"""Gradients from a recorded CUDA graph are those of the loss, whatever the batch."""

import pytest
import torch
from torch import Tensor, nn

from trihybrid.train.graph import GraphedGradients

pytestmark = pytest.mark.gpu


class Small(nn.Module):
    """A loss with a switch, and with a parameter that it does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Parameter(torch.randn(8, 4, device="cuda"))
        self.unused = nn.Parameter(torch.randn(3, device="cuda"))
        self.switch = torch.ones((), device="cuda")

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.switch * (x @ self.used).tanh() - y).square().mean()


def batch(seed: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=made).cuda(), torch.randn(rows, 4, generator=made).cuda()


def expected(small: Small, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    loss = small.loss(*inputs)
    return loss.detach(), torch.autograd.grad(loss, small.used)[0]


# torch 2.11's compiler imports what it deprecates, and advises another precision.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_every_batch_has_its_own_loss_and_gradient(compiled: bool) -> None:
    small = Small()
    graphed = GraphedGradients(torch.compile(small.loss) if compiled else small.loss, small.parameters())
    losses = []
    for seed in range(4):
        small.zero_grad()
        losses.append(graphed(*batch(seed)))
        _, gradient = expected(small, batch(seed))
        torch.testing.assert_close(small.used.grad, gradient)
        assert small.unused.grad is None
        with torch.no_grad():
            small.used.add_(0.1 * gradient)
    assert len({loss.item() for loss in losses}) == 4


def test_shares_add_up_and_switches_are_seen() -> None:
    small = Small()
    graphed = GraphedGradients(small.loss, small.parameters(), share=0.5)
    for value in (1.0, 0.25):
        small.switch.fill_(value)
        small.zero_grad()
        for seed in (0, 1):
            torch.testing.assert_close(graphed(*batch(seed)), expected(small, batch(seed))[0])
        wanted = sum(0.5 * expected(small, batch(seed))[1] for seed in (0, 1))
        torch.testing.assert_close(small.used.grad, wanted)


def test_a_batch_of_another_shape_is_refused() -> None:
    small = Small()
    graphed = GraphedGradients(small.loss, small.parameters())
    graphed(*batch(0))
    with pytest.raises(ValueError, match="recorded for"):
        graphed(*batch(0, rows=8))
