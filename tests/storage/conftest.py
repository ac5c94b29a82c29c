"""Files in pieces that are smaller than tensors."""

import pytest

from trihybrid.storage import digest, piece_writer


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Files are hashed and written in pieces of so few bytes that tensors span several."""
    for module in (digest, piece_writer):
        monkeypatch.setattr(module, "PIECE", 100)
    return 100
