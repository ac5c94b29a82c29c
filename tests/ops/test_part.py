"""What a part gets of the parts before it, and what it gives back to them, against the whole row.

Legend: B batch, T time, S tokens before a part, G heads.
"""

import pytest
import torch
from torch import Tensor

from thread_workers import ThreadWorkers, by_threads

LENGTH = 5


def rows(parts: int, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(parts)
    shape = (2, parts * LENGTH, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("reach", [0, 1, LENGTH - 1, LENGTH, LENGTH + 2, 3 * LENGTH, 100, None])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_tokens_before_a_part_and_their_gradient(parts: int, reach: int | None) -> None:
    whole_BT = rows(parts).requires_grad_()
    starts = [index * LENGTH for index in range(parts)]
    expected = [whole_BT[:, max(0, start - (start if reach is None else reach)) : start] for start in starts]
    weights = [torch.randn_like(before_BS) for before_BS in expected]
    sum((w * x).sum() for w, x in zip(weights, expected, strict=True)).backward()

    def work(workers: ThreadWorkers) -> tuple[Tensor, Tensor | None]:
        part = workers.part()
        own_BT = whole_BT.detach()[:, starts[part.index] :][:, :LENGTH].requires_grad_()
        before_BS = part.previous(own_BT, reach)
        # Each part's loss knows its own results alone.
        (before_BS * weights[part.index]).sum().backward()
        return before_BS.detach(), own_BT.grad

    found = by_threads(parts, work)
    for (before_BS, _), wanted_BS in zip(found, expected, strict=True):
        assert torch.equal(before_BS, wanted_BS)
    gradient_BT = torch.cat([gradient for _, gradient in found], 1)
    torch.testing.assert_close(gradient_BT, whole_BT.grad, rtol=1e-14, atol=1e-14)


def test_keys_and_values_are_lengthened_alike() -> None:
    keys_BTGD, values_BTGV = rows(3, 8).unflatten(-1, (2, 4)), rows(3, 6).unflatten(-1, (2, 3))

    def work(workers: ThreadWorkers) -> tuple[Tensor, Tensor]:
        part = workers.part()
        own = slice(part.index * LENGTH, (part.index + 1) * LENGTH)
        return part.lengthened(keys_BTGD[:, own], values_BTGV[:, own], LENGTH + 1)

    for index, (k_BSGD, v_BSGV) in enumerate(by_threads(3, work)):
        own = slice(max(0, (index - 1) * LENGTH - 1), (index + 1) * LENGTH)
        assert torch.equal(k_BSGD, keys_BTGD[:, own]) and torch.equal(v_BSGV, values_BTGV[:, own])


def test_twice_differentiated_it_is_refused() -> None:
    def work(workers: ThreadWorkers) -> None:
        x_BT = rows(1).requires_grad_()
        (gradient,) = torch.autograd.grad(
            (workers.part().previous(x_BT) ** 2).sum() + (x_BT**3).sum(), x_BT, create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    by_threads(1, work)
