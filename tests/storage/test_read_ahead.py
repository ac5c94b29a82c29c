"""What is asked for: the files in order, from their beginning on, within the budget."""

import os

import pytest

from trihybrid.storage import read_ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no such request")


def test_the_first_bytes_in_order_within_the_budget(tmp_path, monkeypatch):
    for name, size in (("b.safetensors", 5000), ("a.safetensors", 9000), ("c.safetensors", 7000)):
        (tmp_path / name).write_bytes(b"x" * size)
    asked = []
    monkeypatch.setattr(read_ahead, "MOST", 12_000)
    monkeypatch.setattr(read_ahead, "STEP", 4000)
    monkeypatch.setattr(
        os,
        "posix_fadvise",
        lambda handle, place, length, advice: asked.append((os.fstat(handle).st_size, place, length)),
    )
    thread = read_ahead.read_ahead(tmp_path)
    assert thread is not None
    thread.join()
    assert asked == [(9000, 0, 4000), (9000, 4000, 4000), (9000, 8000, 1000), (5000, 0, 3000)]


def test_a_folder_without_weights_asks_for_nothing(tmp_path):
    assert read_ahead.read_ahead(tmp_path) is None
    assert read_ahead.read_ahead(tmp_path / "missing") is None
