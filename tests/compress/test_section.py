"""The compression section: what it defaults to, what it refuses and how it says so."""

from typing import Any

import pytest
from pydantic import ValidationError

from trihybrid.compress.section import CompressSection


def test_defaults_are_the_documented_ones() -> None:
    section = CompressSection()
    assert section.bits == {"matrix": 6, "lowrank": 8, "embedding": 8, "head": 8}
    assert section.limit_bytes == 16_000_000
    assert section.clip is None


def test_a_role_that_is_not_named_keeps_its_default() -> None:
    assert CompressSection(bits={"matrix": 5}).bits == {"matrix": 5, "lowrank": 8, "embedding": 8, "head": 8}


@pytest.mark.parametrize(("given", "read"), [(12, 12.0), (12.85, 12.85), ("search", "search"), (None, None)])
def test_clips_are_read(given: Any, read: Any) -> None:
    clip = CompressSection(clip=given).clip
    assert clip == read
    assert type(clip) is type(read)


def test_it_survives_json() -> None:
    section = CompressSection(bits={"matrix": 16}, clip="search", gptq=False, codec="rans")
    assert CompressSection.model_validate_json(section.model_dump_json()) == section


@pytest.mark.parametrize(
    "given",
    [
        {"bits": {"matrix": 4}},
        {"bits": {"matrix": 9}},
        {"bits": {"decay": 8}},
        {"bits": {"vector": 8}},
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": float("nan")},
        {"clip": "widest"},
        {"limit_bytes": 0},
        {"calibration_tokens": 0},
        {"small_tensor_elements": -1},
        {"codec": "gzip"},
        {"clips": 3.0},
    ],
)
def test_impossible_values_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        CompressSection(**given)
