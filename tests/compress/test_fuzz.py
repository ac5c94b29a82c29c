"""2,000 hostile files in a process of 256 MiB; `python benchmarks/fuzz_artifact.py` tries 100,000."""

from pathlib import Path

import pytest
from artifact_by_definition import decode_simply
from artifact_mutants import make_mutant, seed_artifacts
from fuzz_artifact import fuzz, judge

from trihybrid.compress import container


def test_no_hostile_file_gets_through() -> None:
    result = fuzz(2000, seed=1)
    assert result["violations"] == []
    assert sum(result["outcomes"].values()) == 2000
    assert result["peak_bytes"] <= 256 * 2**20
    # Blind damage is refused; what is repaired reaches the parsers, and some of it is an artifact of its own.
    assert result["outcomes"]["blind: refused"] > 990
    assert result["outcomes"]["repaired: loads, valid by itself"] > 50
    assert result["outcomes"]["repaired: refused"] > 800


def test_the_seeds_are_valid_and_small() -> None:
    for data in seed_artifacts():
        assert len(data) <= 20_000
        assert decode_simply(data)[1]


def test_a_mutant_is_its_seed_and_number() -> None:
    originals = seed_artifacts()
    for number in range(40):
        assert make_mutant(originals, 5, number) == make_mutant(originals, 5, number)
    assert make_mutant(originals, 5, 1) != make_mutant(originals, 6, 1)


def test_a_reader_that_checks_no_hash_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has teeth: without the hashes of the parts, damage loads as something else."""
    monkeypatch.setattr(container, "_read_part", lambda file, part, size: file.read(part.bytes))
    originals = seed_artifacts()
    verdicts = {
        judge(tmp_path / "a", *make_mutant(originals, 0, number)[1:], repaired=False)
        for number in range(0, 80, 2)
    }
    assert "wrong load: the damage was not seen" in verdicts


def test_a_child_that_dies_is_a_violation() -> None:
    result = fuzz(10, seed=0, limit_bytes=2**24)
    assert len(result["violations"]) == 1
    assert "exit code" in result["violations"][0] or "no answer" in result["violations"][0]
