"""Fake causal language models with known probabilities, and a small text with non-ASCII letters."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from trihybrid.data import Batch, DataSection, PreparedData, RecallSection, prepare

VOCABULARY = 260


class FakeModel(nn.Module):
    """Logits are any function of (input_ids, position_ids); calls are counted, and must come in eval mode."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.part = nn.Dropout()
        self.calls = 0

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not self.training
        assert not self.part.training
        assert not use_cache
        assert input_ids.shape == position_ids.shape
        self.calls += 1
        return SimpleNamespace(logits=self.function(input_ids, position_ids))


@pytest.fixture
def fake() -> Callable[[Callable[[Tensor, Tensor], Tensor]], FakeModel]:
    return FakeModel


@pytest.fixture
def uniform() -> FakeModel:
    return FakeModel(lambda ids, positions: torch.zeros(*ids.shape, VOCABULARY))


@pytest.fixture
def bigram() -> Callable[[int], FakeModel]:
    """A model of a seed whose logits depend on the last token alone: row ids of `model.table` [V, V]."""

    def make(seed: int) -> FakeModel:
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        model = FakeModel(lambda ids, positions: table[ids])
        model.register_buffer("table", table)
        return model

    return make


@pytest.fixture
def batches() -> list[Batch]:
    """Two batches of [2, 7] tokens; documents begin where the position is 0, and their first token is no target."""
    tokens = torch.randint(4, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor(
        [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0], [0, 1, 2, 3, 4, 0, 0]]
    )
    return [Batch(tokens[:2], positions[:2]), Batch(tokens[2:], positions[2:])]


@pytest.fixture
def prepared(tmp_path: Path) -> PreparedData:
    texts = [
        f"Dokument {number}: Gr\u00f6\u00dfe, na\u00efve caf\u00e9, \u4f60\u597d. " * (number + 1)
        for number in range(6)
    ]
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    recall = RecallSection(pairs=8, rounds=3, evaluation_documents=6)
    section = DataSection(source=str(source), validation_fraction=0.5, recall=recall)
    return prepare(section, tmp_path / "data")
