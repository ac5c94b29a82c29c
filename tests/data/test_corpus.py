"""Preparing a corpus: what goes where, the same bytes for any number of processes, and when it is built again."""

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from trihybrid.data import corpus, encode
from trihybrid.data.challenge import export_challenge
from trihybrid.data.corpus import Corpus, CorpusSection, prepare_corpus
from trihybrid.data.encode import EncodedBatch
from trihybrid.data.shards import TokenShards, write_shards
from trihybrid.data.tokens import TextTokenizer, Tokenizer


def lines(name: str, count: int) -> str:
    return "".join(
        json.dumps({"text": f"{name} {number}: " + "\u00e9t\u00e9 " * 9}) + "\n" for number in range(count)
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two files of training text, one of them compressed, and one of validation text."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.jsonl").write_text(lines("train", 20))
    (tmp_path / "train" / "1.jsonl.xz").write_bytes(lzma.compress(lines("more", 10).encode()))
    (tmp_path / "val.jsonl").write_text(lines("held", 5))
    return tmp_path


@pytest.fixture
def section(text: Path) -> CorpusSection:
    return CorpusSection(train=str(text / "train"), validation=str(text / "val.jsonl"))


def texts_of(shards: TokenShards) -> list[str]:
    return [Tokenizer.bytes().decode(document) for document in shards.documents()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_documents_stay_in_their_order(section: CorpusSection, tmp_path: Path) -> None:
    made = prepare_corpus(section, tmp_path / "out")
    texts = texts_of(made.train)
    expected = [f"train {number}" for number in range(20)] + [f"more {number}" for number in range(10)]
    assert [text.split(":")[0] for text in texts] == expected
    assert [text.split(":")[0] for text in texts_of(made.validation)] == [f"held {n}" for n in range(5)]
    assert made.train.text_bytes == sum(len(text.encode()) for text in texts) == len(made.train) - 30
    assert made.tokenizer.hash == Tokenizer.bytes().hash


def test_validation_files_inside_the_training_folder_are_not_trained_on(
    section: CorpusSection, text: Path, tmp_path: Path
) -> None:
    (text / "train" / "sub").mkdir()
    (text / "val.jsonl").rename(text / "train" / "sub" / "val.jsonl")
    inside = section.model_copy(update={"validation": str(text / "train" / "sub")})
    made = prepare_corpus(inside, tmp_path / "out")
    assert (made.train.manifest.documents, made.validation.manifest.documents) == (30, 5)
    same_file = {"train": str(text / "train" / "0.jsonl"), "validation": str(text / "train" / "0.jsonl")}
    for update in (same_file, {"train": "builtin", "validation": "builtin"}):
        with pytest.raises(ValueError, match=r"train and validation are both .* set validation to null"):
            prepare_corpus(section.model_copy(update=update), tmp_path / "same")


def test_a_split_shares_no_document(text: Path, tmp_path: Path) -> None:
    (text / "train" / "2.jsonl").write_text(lines("train", 3))  # repeated: they must not be on both sides
    section = CorpusSection(train=str(text / "train"), validation_fraction=0.2, seed=1)
    made = prepare_corpus(section, tmp_path / "out")
    train, held = texts_of(made.train), texts_of(made.validation)
    assert (len(train), len(held)) == (24, 6)
    assert len({*train, *held}) == 30
    other = prepare_corpus(section.model_copy(update={"seed": 2}), tmp_path / "other")
    assert texts_of(other.validation) != held


def test_the_builtin_text_is_shuffled_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"document {number} of Python" for number in range(40)]
    monkeypatch.setattr(corpus, "read_documents", lambda source: documents)
    made = prepare_corpus(CorpusSection(), tmp_path / "a")
    train = texts_of(made.train)
    assert sorted(train + texts_of(made.validation)) == sorted(documents)
    assert train != sorted(train, key=documents.index)
    again = prepare_corpus(CorpusSection(), tmp_path / "b")
    assert (again.train.hash, again.validation.hash) == (made.train.hash, made.validation.hash)


def test_the_same_input_is_used_again_by_hash(
    section: CorpusSection, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    first = prepare_corpus(section, folder)
    stamps = {file: file.stat().st_mtime_ns for file in folder.rglob("*.*")}
    (text / "val.jsonl").rename(text / "renamed.jsonl")
    changed = section.model_copy(update={"validation": str(text / "renamed.jsonl"), "seed": 5})
    caplog.set_level("INFO")
    again = prepare_corpus(changed, folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.*")} == stamps
    assert (again.train.hash, again.validation.hash) == (first.train.hash, first.validation.hash)
    assert not caplog.messages
    (text / "renamed.jsonl").rename(text / "renamed.txt")  # the same bytes, but another text
    other_kind = section.model_copy(update={"validation": str(text / "renamed.txt")})
    with pytest.raises(ValueError, match="validation was made of other text"):
        prepare_corpus(other_kind, folder, replace=False)
    (text / "renamed.txt").rename(text / "renamed.jsonl")
    (text / "train" / "0.jsonl").write_text(lines("train", 21))
    with pytest.raises(ValueError, match=r"train was made of other text or settings; restore them"):
        prepare_corpus(changed, folder, replace=False)
    third = prepare_corpus(changed, folder)
    assert third.validation.hash == first.validation.hash
    assert third.train.manifest.documents == 31
    assert "train was made of other text or settings, building it again" in caplog.text


def test_the_way_the_text_is_handed_out_changes_no_byte(
    section: CorpusSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That processes return the same batches is a test of encode; here that all of them are asked for, and joined."""
    prepare_corpus(section, tmp_path / "one")
    asked = []

    def encode_here(
        documents: Iterable[str], tokenizer: TextTokenizer, processes: int, skip: int
    ) -> Iterator[EncodedBatch]:
        asked.append(processes)
        return encode.encode_documents(documents, tokenizer, skip=skip)

    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(corpus, "encode_documents", encode_here)
    prepare_corpus(section, tmp_path / "two", processes=7)
    assert asked == [7, 7]
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_an_interrupted_build_leaves_nothing_that_looks_complete(
    section: CorpusSection, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    good = prepare_corpus(section, folder).train.hash
    (text / "train" / "0.jsonl").write_text(lines("train", 20) + "{")
    with pytest.raises(ValueError, match=r"0\.jsonl:21 is not JSON"):
        prepare_corpus(section, folder)
    assert not (folder / "train" / "manifest.json").exists()
    assert (folder / "validation" / "manifest.json").exists()
    (text / "train" / "0.jsonl").write_text(lines("train", 20))
    assert prepare_corpus(section, folder).train.hash == good


def test_an_error_of_a_fresh_build_leaves_only_what_the_next_call_goes_on_from(
    section: CorpusSection, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.txt").touch()
    empty = CorpusSection(train=str(tmp_path / "empty.txt"))
    (tmp_path / "given").mkdir()
    for folder in (tmp_path / "new" / "out", tmp_path / "given"):
        with pytest.raises(ValueError, match=r"empty\.txt is empty text"):
            prepare_corpus(empty, folder)
    assert not (tmp_path / "new").exists() and not list((tmp_path / "given").iterdir())
    (text / "train" / "0.jsonl").write_text(lines("train", 20) + "{")
    with pytest.raises(ValueError, match=r"0\.jsonl:21 is not JSON"):
        prepare_corpus(section, tmp_path / "unfinished")
    assert set(files_of(tmp_path / "unfinished")) == {"validation/00000.bin", "validation/manifest.json"}
    monkeypatch.setattr(corpus, "TOKENS_PER_SHARD", 150)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 100)
    with pytest.raises(ValueError, match=r"0\.jsonl:21 is not JSON"):
        prepare_corpus(section, tmp_path / "begun")
    assert {"train/00000.bin", "train/journal.json"} <= set(files_of(tmp_path / "begun"))


def test_a_validation_text_that_is_counted_wrong_is_never_complete(
    section: CorpusSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Tokenizer.byte_rules

    def wrong(self: Tokenizer) -> tuple:
        base_V, lead_V, border_V = right(self)
        return base_V + (base_V.cumsum() == 2), lead_V, border_V

    monkeypatch.setattr(Tokenizer, "byte_rules", wrong)
    (tmp_path / "bad.txt").write_bytes(b"a\x01b")
    bad = section.model_copy(update={"validation": str(tmp_path / "bad.txt")})
    for _ in range(2):
        with pytest.raises(ValueError, match="document 0 decodes to 3 bytes, the byte table counts 4"):
            prepare_corpus(bad, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_documents_that_encode_to_nothing_are_left_out_with_a_line(
    sentencepiece_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\u0001"}\n{"text": "baba"}\n{"text": "delo"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "baba"}\n')
    section = CorpusSection(
        train=str(tmp_path / "a.jsonl"),
        validation=str(tmp_path / "b.jsonl"),
        tokenizer=str(sentencepiece_model),
    )
    made = prepare_corpus(section, tmp_path / "out")
    assert (made.train.manifest.documents, made.train.text_bytes) == (2, 8)
    assert "data: train leaves out 1 documents that encode to nothing" in caplog.messages


def same(one: Corpus, other: Corpus) -> bool:
    streams = [(corpus.train, corpus.validation) for corpus in (one, other)]
    return all(
        a.tokens(0, len(a)).tolist() == b.tokens(0, len(b)).tolist() for a, b in zip(*streams, strict=True)
    )


def test_prepared_folders_and_shards_are_used_where_they_are(section: CorpusSection, tmp_path: Path) -> None:
    made = prepare_corpus(section, tmp_path / "a")
    whole = prepare_corpus(CorpusSection(train=str(tmp_path / "a")), tmp_path / "b")
    parts = CorpusSection(train=str(tmp_path / "a" / "train"), validation=str(tmp_path / "a" / "validation"))
    assert same(whole, made) and same(prepare_corpus(parts, tmp_path / "b"), made)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="holds tokens of training alone"):
        prepare_corpus(CorpusSection(train=str(tmp_path / "a" / "train")), tmp_path / "b")


def test_the_challenges_files_are_a_source(section: CorpusSection, tmp_path: Path) -> None:
    made = prepare_corpus(section, tmp_path / "a")
    export_challenge(made.train, tmp_path / "tokens", "train", 300)
    with pytest.raises(ValueError, match="holds tokens of training alone"):
        prepare_corpus(CorpusSection(train=str(tmp_path / "tokens")), tmp_path / "b")
    export_challenge(made.validation, tmp_path / "tokens", "val", 300)
    imported = prepare_corpus(CorpusSection(train=str(tmp_path / "tokens")), tmp_path / "b")
    assert same(imported, made)
    assert imported.validation.text_bytes == made.validation.text_bytes
    stamp = (tmp_path / "b" / "train" / "manifest.json").stat().st_mtime_ns
    prepare_corpus(CorpusSection(train=str(tmp_path / "tokens")), tmp_path / "b")
    assert (tmp_path / "b" / "train" / "manifest.json").stat().st_mtime_ns == stamp


def test_shards_of_another_tokenizer_are_refused(section: CorpusSection, tmp_path: Path) -> None:
    write_shards(tmp_path / "x", [[5, 6]], 260, 2, text_bytes=2, tokenizer_hash="another")
    for field in ("train", "validation"):
        with pytest.raises(ValueError, match="was made with another tokenizer than bytes"):
            prepare_corpus(section.model_copy(update={field: str(tmp_path / "x")}), tmp_path / "out")


def test_a_missing_source_and_an_empty_folder(section: CorpusSection, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        prepare_corpus(section.model_copy(update={"train": str(tmp_path / "nothing")}), tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text"):
        prepare_corpus(section.model_copy(update={"validation": str(tmp_path / "empty")}), tmp_path / "out")


def test_the_section_from_yaml() -> None:
    section = CorpusSection.model_validate(yaml.safe_load("{train: text, tokenizer: x.model}"))
    assert (section.train, section.validation, section.tokenizer) == ("text", None, "x.model")


@pytest.mark.parametrize(
    "fields",
    [{"validation_fraction": 0}, {"validation_fraction": 1}, {"seed": -1}, {"train": ""}, {"more": 1}],
)
def test_values_out_of_bounds_are_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        CorpusSection.model_validate(fields)
