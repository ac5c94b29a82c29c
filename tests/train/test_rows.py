"""Rows of several workers: cut as FSDP cuts, and put together again; norms and Muon as of whole tensors."""

import pytest
import torch
from torch import Tensor, nn

from thread_workers import by_threads
from trihybrid.testing import relative_error
from trihybrid.train import MuonSection, OptimizerSection, Workers, build_optimizer
from trihybrid.train.gradients import GradientNorms
from trihybrid.train.rows import Rows, padded

SHAPES = {"a": (7, 5), "b": (4, 6), "c": (7, 5), "d": (2, 9), "vector": (3,)}
COUNT = 3


def wholes(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 11])
def test_parts_are_those_of_torch_chunk(size: int, count: int) -> None:
    whole = torch.arange(2.0 * size).view(size, 2)
    chunks = list(torch.chunk(whole, count))
    chunks += [whole[:0]] * (count - len(chunks))
    for rank, chunk in enumerate(chunks):
        rows = Rows((size, 2), rank, count)
        assert torch.equal(rows.cut(whole), chunk)
        full = padded(rows, whole, torch.device("cpu"))
        assert full.shape == (rows.share, 2)
        assert torch.equal(full[: len(chunk)], chunk) and not full[len(chunk) :].any()


def test_parts_join_to_the_whole_on_every_worker() -> None:
    tensors = wholes(0)

    def join(workers: Workers) -> list[Tensor]:
        rows = Rows((7, 5), workers.rank, workers.count)
        return rows.join([rows.cut(tensors["a"]), rows.cut(tensors["c"])], workers)

    for first, second in by_threads(COUNT, join):
        assert torch.equal(first, tensors["a"]) and torch.equal(second, tensors["c"])


@pytest.mark.parametrize("normalise", [False, True])
def test_norms_clipping_and_muon_on_rows_are_those_of_whole_matrices(normalise: bool) -> None:
    """Three steps; one matrix has fewer rows than there are workers."""
    section = OptimizerSection(
        name="muon", learning_rate=0.1, gradient_clip=0.5, muon=MuonSection(normalise_rows=normalise)
    )
    roles = {name: "matrix" if len(shape) == 2 else "vector" for name, shape in SHAPES.items()}

    def train(workers: Workers) -> tuple[dict[str, Tensor], list[float]]:
        rows = {name: Rows(shape, workers.rank, workers.count) for name, shape in SHAPES.items()}
        own = {name: nn.Parameter(rows[name].cut(tensor)) for name, tensor in wholes(0).items()}
        optimizers = build_optimizer(own, roles, section, workers, rows if workers.count > 1 else {})
        totals = []
        for step in range(3):
            for name, gradient in wholes(step + 1).items():
                own[name].grad = rows[name].cut(gradient).clone()
            norms = GradientNorms(own, workers)
            norms.clip(section.gradient_clip)
            totals += [norms.total.item(), *norms.each_P.tolist()]
            optimizers.step()
        return {name: rows[name].join([p.detach()], workers)[0] for name, p in own.items()}, totals

    ((wanted, norms),) = by_threads(1, train)
    for found, totals in by_threads(COUNT, train):
        assert totals == pytest.approx(norms, rel=1e-13)
        for name, tensor in wanted.items():
            assert relative_error(found[name], tensor) <= 1e-12, name
