"""Figures at their borders: one point, flat lines, a very far break-even; every one is a PNG of the same size."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.report import plots
from trihybrid.report.cache_bytes import CacheBytes
from trihybrid.report.plots import RecallBin


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels; fails on anything that is no PNG."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def border_figures() -> dict[str, bytes]:
    """One figure of each kind and border."""
    return {
        "one point": plots.loss_curve("aligned", [(0, 0.0)], []),
        "unknown stage, negative loss": plots.loss_curve("own-name", [(0, -1.0), (1, 1.0)], [(0, 0.5)]),
        "many steps": plots.loss_curve(
            "teacher", [(step, 9.0 * 0.99**step + 1e-4) for step in range(1000)], []
        ),
        "35 layers": plots.alignment_curves("aligned", {layer: [(0, 1.0), (9, 0.1)] for layer in range(35)}),
        "one bin": plots.recall_curves({"teacher": [RecallBin(0, 1, 1.0, 1)]}, None),
        "far window": plots.recall_curves({"teacher": [RecallBin(64, 128, 0.0, 3)]}, 4096),
        "one position": plots.position_curves({"teacher": [(0, 3.0)]}, 1),
        "flat cache": plots.cache_curves(CacheBytes(0, 4096), CacheBytes(0, 4096)),
        "no student cache": plots.cache_curves(CacheBytes(8, 0), CacheBytes(0, 0)),
        "break-even at one": plots.cache_curves(CacheBytes(2, 0), CacheBytes(1, 1)),
        "break-even beyond reach": plots.cache_curves(CacheBytes(1.0001, 0), CacheBytes(1, 10**9)),
    }


def test_borders_give_figures_of_one_size():
    sizes = {name: size(png) for name, png in border_figures().items()}
    assert set(sizes.values()) == {(960, 740)}


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 10_000), st.data())
def test_wilson_interval_holds_the_accuracy(count, data):
    right = data.draw(st.integers(0, count))
    low, high = RecallBin(1, 2, right / count, count).interval()
    assert -1e-12 <= low <= right / count <= high <= 1 + 1e-12


def test_wilson_interval_by_hand():
    # 0 of 10: z^2 / (n + z^2) = 3.8416 / 13.8416.
    assert RecallBin(1, 2, 0.0, 10).interval() == pytest.approx((0.0, 0.277540), abs=1e-5)


def test_running_mean():
    assert plots._running_mean([1.0, 3.0, 5.0, 9.0], 2) == [1.0, 2.0, 4.0, 7.0]
