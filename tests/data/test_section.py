"""The section's bounds, and preparation: what goes where, and when shards are built again."""

import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from trihybrid.data.section import DataSection, RecallSection, prepare
from trihybrid.data.tokens import Tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": f"document {number}: " + "\u00e9t\u00e9 " * 40}) for number in range(100)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines))
    return path


def section_of(source: Path, **recall: object) -> DataSection:
    shape = {"pairs": 4, "rounds": 3, "evaluation_documents": 5} | recall
    return DataSection(
        source=str(source), validation_fraction=0.1, recall=RecallSection.model_validate(shape)
    )


def documents_of(tokens: list[int]) -> list[str]:
    """The texts of a stream of byte tokens."""
    borders = [place for place, token in enumerate(tokens) if token == 2] + [len(tokens)]
    return [Tokenizer.bytes().decode(tokens[start:stop]) for start, stop in pairwise(borders)]


def test_training_holds_the_fraction_of_probes_and_validation_none(source: Path, tmp_path: Path) -> None:
    section = section_of(source, fraction=0.25)
    data = prepare(section, tmp_path / "data")
    train = documents_of(data.train.tokens(0, len(data.train)).tolist())
    planted = [text for text in train if text.startswith("recall:")]
    share = sum(len(text.encode()) + 1 for text in planted) / len(data.train)
    assert share == pytest.approx(0.25, abs=0.005)
    assert len(train) - len(planted) == 90
    assert documents_of(data.validation.tokens(0, len(data.validation)).tolist()) == data.validation_documents
    assert len(data.validation_documents) == 10
    assert not set(data.validation_documents) & set(train)
    assert data.train.text_bytes == sum(len(text.encode()) for text in train)
    assert data.validation.text_bytes == len(data.validation) - 10  # one BOS a document
    assert data.recall.tokens_NT.shape[0] == 5
    assert data.recall.answer_NT.sum() == 5 * 4 * 2
    evaluated = {data.tokenizer.decode(row) for row in data.recall.tokens_NT.tolist()}
    assert not evaluated & set(planted)


def test_without_a_fraction_training_is_text_only(source: Path, tmp_path: Path) -> None:
    data = prepare(section_of(source, fraction=0), tmp_path / "data")
    assert data.train.manifest.documents == 90


def test_the_same_input_is_reused_and_another_is_not(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "data"
    first = prepare(section_of(source), folder)
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("*.*")}
    again = prepare(section_of(source, evaluation_documents=7), folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.*")} == stamps
    assert (again.train.hash, again.validation.hash) == (first.train.hash, first.validation.hash)
    assert not caplog.messages
    other = prepare(section_of(source, pairs=5), folder)
    assert other.train.hash != first.train.hash
    assert other.validation.hash == first.validation.hash
    assert len(caplog.messages) == 1
    assert "train was made of other text or settings" in caplog.messages[0]
    source.write_text(source.read_text() + '\n{"text": "one more"}')
    assert prepare(section_of(source), folder).train.hash != first.train.hash


def test_shards_that_changed_are_an_error(source: Path, tmp_path: Path) -> None:
    section = section_of(source)
    prepare(section, tmp_path)
    file = tmp_path / "train" / "00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="expected sha256"):
        prepare(section, tmp_path)


def test_a_tokenizer_from_a_file_gives_the_same_shards(source: Path, tmp_path: Path) -> None:
    Tokenizer.bytes().save(tmp_path / "tokenizer")
    first = prepare(section_of(source), tmp_path / "a")
    changed = section_of(source).model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    assert prepare(changed, tmp_path / "b").train.hash == first.train.hash


def test_the_section_from_yaml() -> None:
    section = DataSection.model_validate(
        yaml.safe_load("{source: corpus, recall: {fraction: 1e-1, pairs: 8}}")
    )
    assert (section.source, section.recall.fraction, section.recall.pairs) == ("corpus", 0.1, 8)
    assert DataSection().model_dump()["recall"]["rounds"] == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"validation_fraction": 0},
        {"validation_fraction": 1},
        {"seed": -1},
        {"source": ""},
        {"unknown": 1},
        {"recall": {"pairs": 27}},
        {"recall": {"rounds": 1}},
        {"recall": {"pairs": 4, "fewest_pairs": 5}},
        {"recall": {"fraction": 0.95}},
        {"recall": {"values": 1}},
        {"recall": {"joiner": "="}},
        {"recall": {"evaluation_documents": 0}},
        {"recall": {"unknown": 1}},
    ],
)
def test_values_out_of_bounds_are_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        DataSection.model_validate(fields)


def test_shards_of_other_input_are_kept_where_they_may_not_be_replaced(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    made = prepare(section_of(source), folder, replace=False)
    assert prepare(section_of(source), folder, replace=False).train.hash == made.train.hash
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"train was made of other text or settings; restore them"):
        prepare(section_of(source, pairs=5), folder, replace=False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
