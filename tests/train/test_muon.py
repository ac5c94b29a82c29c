"""Muon in batches: torch's own update, orthogonal in effect, the same whatever the batch."""

import pytest
import torch
from torch import nn

from trihybrid.train.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(12, 12), (8, 24), (24, 8)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_direction_is_that_of_the_polar_factor() -> None:
    matrix = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix[0], full_matrices=False)
    ours = orthogonalise(matrix)[0]
    assert torch.nn.functional.cosine_similarity(ours.flatten(), (u @ vh).flatten(), dim=0) > 0.97


def test_updates_equal_torchs_own_within_its_bfloat16() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(16, 16), (16, 16), (8, 16), (16, 8)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    optimizers = [
        Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() / (other - before).norm() < 3e-2


def test_a_matrix_moves_the_same_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    batch = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(orthogonalise(batch)[2:3], orthogonalise(batch[2:3]), rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_gives_no_update_and_no_nan() -> None:
    parameter = nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.zeros(4, 4)
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(parameter, torch.ones(4, 4))
