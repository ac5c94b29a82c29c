"""A build of shards that stopped anywhere goes on behind its finished shards and ends with the same bytes."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from trihybrid.data import corpus, encode
from trihybrid.data.corpus import CorpusSection, prepare_corpus
from trihybrid.data.encode import EncodedBatch
from trihybrid.data.journal import JOURNAL
from trihybrid.data.tokens import TextTokenizer

LENGTHS = [3, 40, 7, 7, 150, 1, 1, 60, 20, 9, 9, 200, 5]


class Stop(BaseException):
    """Stands for a kill."""


class Encoding:
    """`encode_documents`, which counts its batches and stops before the one of a number."""

    def __init__(self) -> None:
        self.made, self.stop = 0, 10**9

    def __call__(
        self, documents: Iterable[str], tokenizer: TextTokenizer, processes: int, skip: int
    ) -> Iterator[EncodedBatch]:
        for batch in encode.encode_documents(documents, tokenizer, processes, skip):
            if self.made == self.stop:
                raise Stop
            self.made += 1
            yield batch


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> Encoding:
    """Batches of about 20 characters and shards of 50 tokens."""
    counted = Encoding()
    monkeypatch.setattr(corpus, "encode_documents", counted)
    monkeypatch.setattr(corpus, "TOKENS_PER_SHARD", 50)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 20)
    return counted


@pytest.fixture
def section(tmp_path: Path) -> CorpusSection:
    write(tmp_path / "train.jsonl", "t")
    (tmp_path / "val.txt").write_text("held out")
    return CorpusSection(train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "val.txt"))


def write(file: Path, letter: str) -> None:
    file.write_text("".join(json.dumps({"text": letter * length}) + "\n" for length in LENGTHS))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("train/*")}


def test_stopped_anywhere_it_ends_with_the_same_bytes(
    section: CorpusSection, encoding: Encoding, tmp_path: Path
) -> None:
    prepare_corpus(section, tmp_path / "whole")
    whole, batches = files_of(tmp_path / "whole"), encoding.made - 1
    assert len(whole) == 12 and JOURNAL not in whole and batches > 5
    for stop in range(batches):
        folder = tmp_path / str(stop)
        encoding.made, encoding.stop = -1, stop  # one batch is the validation's
        with pytest.raises(Stop):
            prepare_corpus(section, folder)
        assert "manifest.json" not in files_of(folder)
        finished = len([name for name in files_of(folder) if name.endswith(".bin")])
        # Stopped again, and damaged where there is something to damage.
        if stop % 3 == 1 and finished:
            (folder / "train" / "00000.bin").write_bytes(b"damaged")
        encoding.made, encoding.stop = 0, 10**9
        prepare_corpus(section, folder, processes=1)
        assert files_of(folder) == whole
        if stop % 3 != 1 and finished:
            assert encoding.made < batches


def test_a_journal_of_other_text_does_not_count(
    section: CorpusSection, encoding: Encoding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    encoding.stop = 5
    with pytest.raises(Stop):
        prepare_corpus(section, tmp_path / "out")
    write(Path(section.train), "u")
    encoding.stop = 10**9
    prepare_corpus(section, tmp_path / "out")
    prepare_corpus(section, tmp_path / "whole")
    assert "is of other text or settings, the build begins anew" in caplog.text
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_damaged_journal_does_not_count(
    section: CorpusSection, encoding: Encoding, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_corpus(section, tmp_path / "whole")
    encoding.made, encoding.stop = 0, 5
    with pytest.raises(Stop):
        prepare_corpus(section, tmp_path / "out")
    (tmp_path / "out" / "train" / JOURNAL).write_text("{")
    encoding.stop = 10**9
    prepare_corpus(section, tmp_path / "out")
    assert "is damaged, the build begins anew" in caplog.text
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
