"""The shared pass: training flags, inference mode, chunking, refusals."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trihybrid.data import Batch
from trihybrid.evaluate.scoring import Scores, evaluation_mode, score


class Recorder:
    def __init__(self) -> None:
        self.scores: list[Scores] = []

    def add(self, scores: Scores) -> None:
        self.scores.append(scores)


def test_every_counting_target_is_scored_once_in_any_chunk(bigram, batches) -> None:
    model = bigram(0)
    expected = []
    for batch in batches:
        log_p = torch.log_softmax(model.table, dim=-1)
        for row in range(2):
            for time in range(6):
                if batch.positions_BT[row, time + 1] != 0:
                    now, following = batch.tokens_BT[row, time], batch.tokens_BT[row, time + 1]
                    expected.append((-log_p[now, following].item(), batch.positions_BT[row, time].item()))
    assert len(expected) == 6 + 5 + 3 + 4
    for chunk in (1, 4, 1000):
        recorder = Recorder()
        score(model, batches, [recorder], chunk=chunk)
        nats = torch.cat([scores.nats_N for scores in recorder.scores])
        positions = torch.cat([scores.positions_N for scores in recorder.scores])
        assert max(len(scores.nats_N) for scores in recorder.scores) <= chunk
        assert nats.dtype == torch.float32
        assert nats.tolist() == pytest.approx([nat for nat, _ in expected], rel=1e-6)
        assert positions.tolist() == [position for _, position in expected]


def test_flags_come_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1].eval()
    model[1][1].train()
    flags = [module.training for module in model.modules()]
    inside = []

    def fail() -> None:
        with evaluation_mode(model, None):
            inside.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [False] * 5
    assert [module.training for module in model.modules()] == flags


def test_runs_in_inference_mode_but_makes_batches_outside(fake, batches) -> None:
    modes = []

    def logits(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_inference_mode_enabled())
        return torch.zeros(*ids.shape, 260)

    def made() -> object:
        for batch in batches:
            modes.append(torch.is_inference_mode_enabled())
            yield batch

    score(fake(logits), made(), [])
    assert modes == [False, True, False, True]


def test_low_precision_logits_are_normalised_in_float32(fake, batches) -> None:
    table = torch.randn(260, 260, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, wide = Recorder(), Recorder()
    score(fake(lambda ids, positions: table[ids]), batches, [low])
    score(fake(lambda ids, positions: table.float()[ids]), batches, [wide])
    for one, other in zip(low.scores, wide.scores, strict=True):
        assert one.nats_N.dtype == torch.float32
        assert torch.equal(one.nats_N, other.nats_N)


def test_refusals(fake, uniform, batches) -> None:
    only_borders = Batch(torch.full((1, 3), 7), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no target that counts"):
        score(uniform, [only_borders], [])
    with pytest.raises(ValueError, match="no target that counts"):
        score(uniform, [], [])
    smaller = fake(lambda ids, positions: torch.zeros(*ids.shape, 259))
    with pytest.raises(ValueError, match="260 tokens and the teacher's 259"):
        score(uniform, batches, [], teacher=smaller)
    with pytest.raises(ValueError, match=r"returned logits \[2, 6\]"):
        score(fake(lambda ids, positions: torch.zeros(ids.shape)), batches, [])
    broken = fake(lambda ids, positions: torch.full((*ids.shape, 260), torch.nan))
    with pytest.raises(ValueError, match="not finite for 11 tokens"):
        score(broken, batches, [])
    assert broken.training
    assert broken.part.training


def test_moves_batches_to_the_model(batches) -> None:
    class Meta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, input_ids, position_ids, use_cache) -> SimpleNamespace:
            assert input_ids.device.type == position_ids.device.type == "meta"
            raise KeyError

    with pytest.raises(KeyError):
        score(Meta(), batches, [])
