"""Muon in batches: torch's own update, orthogonal in effect, the same whatever the batch."""

import pytest
import torch
from torch import nn

from trihybrid.train.distributed import Workers
from trihybrid.train.muon import Muon, orthogonalise, update_scale


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


@pytest.mark.parametrize("shape", [(12, 12), (8, 24), (24, 8)])
def test_polar_express_brings_small_singular_values_near_one_too(shape: tuple[int, int]) -> None:
    """Singular values from 0.0015 of the norm up: Polar Express ends within 0.16 of one, the quintic does not."""
    generator = torch.Generator().manual_seed(4)
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64), False)
    sizes = torch.logspace(-2.7, 0.0, min(shape), dtype=torch.float64)
    matrix_NRC = ((u * sizes) @ vh)[None]
    polar = torch.linalg.svdvals(orthogonalise(matrix_NRC, 5, "polar"))
    quintic = torch.linalg.svdvals(orthogonalise(matrix_NRC, 5, "quintic"))
    assert (polar - 1).abs().max() < 0.16
    assert (quintic - 1).abs().max() > 0.25


def test_the_scale_of_an_update_as_numbers() -> None:
    assert update_scale(torch.Size([64, 16]), "rms") == pytest.approx(0.2 * 8)
    assert update_scale(torch.Size([64, 16]), "shape") == 2.0
    assert update_scale(torch.Size([16, 64]), "shape") == 1.0


def test_a_shape_scaled_update_is_the_orthogonal_matrix_itself() -> None:
    parameter = nn.Parameter(torch.zeros(8, 16, dtype=torch.float64))
    gradient = torch.randn(8, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameter.grad = gradient.clone()
    Muon([parameter], lr=0.5, weight_decay=0.0, scale="shape", coefficients="polar").step()
    wanted = -0.5 * orthogonalise(gradient[None], 5, "polar")[0]
    torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-9, atol=1e-12)


def test_normalised_rows_make_the_scale_of_a_row_irrelevant() -> None:
    generator = torch.Generator().manual_seed(6)
    gradient = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    rows = torch.tensor([1.0, 10.0, 0.1, 3.0, 7.0, 0.01], dtype=torch.float64)[:, None]
    parameters = [nn.Parameter(torch.zeros(6, 10, dtype=torch.float64)) for _ in range(2)]
    for parameter, scale in zip(parameters, (torch.ones_like(rows), rows), strict=True):
        parameter.grad = gradient * scale
        Muon([parameter], lr=0.1, normalise_rows=True).step()
    torch.testing.assert_close(*(p.detach() for p in parameters), rtol=1e-9, atol=1e-12)
    plain = nn.Parameter(torch.zeros(6, 10, dtype=torch.float64))
    plain.grad = gradient * rows
    Muon([plain], lr=0.1).step()
    assert (plain - parameters[0]).norm() > 0.1 * plain.norm()


def test_a_momentum_that_changes_forgets_no_gradient_but_by_its_own_rate() -> None:
    """m <- mu m + g and the update g + mu m, by hand with two momenta; a row's orthogonal matrix is its direction."""
    parameter = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    muon = Muon([parameter], lr=0.1, weight_decay=0.0)
    for momentum, gradient in ((0.5, [1.0, 0.0]), (0.75, [0.0, 2.0])):
        before = parameter.detach().clone()
        muon.param_groups[0]["momentum"] = momentum
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        muon.step()
    assert muon.state[parameter]["momentum_buffer"].tolist() == [[0.75, 2.0]]
    moved = (before - parameter.detach())[0]
    assert (moved[0] / moved[1]).item() == pytest.approx(0.75 * 0.75 / (2.0 + 0.75 * 2.0), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_shares_of_a_batch_put_together_are_the_batch(count: int) -> None:
    """Three workers in one process: each one's share, gathered by hand."""
    matrix_NRC = torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    shares = []

    class Alone(Workers):
        def gather(self, share_N: torch.Tensor) -> torch.Tensor:
            shares.append(share_N)
            return share_N

    for rank in range(3):
        muon = Muon([nn.Parameter(torch.zeros(4, 6))], workers=Alone(rank, 3))
        muon._direction(matrix_NRC, 5)
    assert len({share.shape for share in shares}) == 1
    torch.testing.assert_close(torch.cat(shares)[:count], orthogonalise(matrix_NRC), rtol=1e-10, atol=1e-12)
