"""Text from Parquet files and from data sets by name."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trihybrid.data import read_documents
from trihybrid.data.columns import parquet_texts
from trihybrid.data.corpus import CorpusSection, prepare_corpus


class FakeDataset:
    """A table as `datasets` hands it out."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns = columns

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def select_columns(self, names: list[str]) -> list[dict[str, Any]]:
        (name,) = names
        return [{name: value} for value in self._columns[name]]


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], FakeDataset]:
    """(name, configuration, split) -> table, behind the package's name."""
    known: dict[tuple[str, str | None, str], FakeDataset] = {}

    def load_dataset(name: str, configuration: str | None, split: str) -> FakeDataset:
        if (name, configuration, split) not in known:
            raise ValueError(f"Unknown split {split!r}")
        return known[name, configuration, split]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return known


def test_a_data_set_is_named_with_split_and_configuration(datasets: dict) -> None:
    datasets["a/b", None, "train"] = FakeDataset({"text": ["one", " \n", "two"], "id": [1, 2, 3]})
    datasets["a/b", "raw", "test"] = FakeDataset({"text": ["three"]})
    assert read_documents("datasets:a/b") == ["one", "two"]
    assert read_documents("datasets:a/b:test:raw") == ["three"]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("datasets:a/b:dev", r"datasets:a/b:dev: datasets cannot load it: Unknown split 'dev'"),
        ("datasets:a/b", r'has no column "text", it has \[\'content\'\]'),
        ("datasets:gap", r'datasets:gap:1 has no string in its column "text"'),
        ("datasets:", r'source datasets:: give "datasets:NAME"'),
        ("datasets:a:b:c:d", r'give "datasets:NAME"'),
    ],
)
def test_what_is_no_text_is_refused(datasets: dict, source: str, match: str) -> None:
    datasets["a/b", None, "train"] = FakeDataset({"content": ["one"]})
    datasets["gap", None, "train"] = FakeDataset({"text": ["one", None]})
    with pytest.raises(ValueError, match=match):
        read_documents(source)


def test_a_package_that_is_missing_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets is needed .* pip install 'trihybrid\[data\]'"):
        read_documents("datasets:a/b")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"pyarrow is needed .* pip install 'trihybrid\[data\]'"):
        list(parquet_texts(Path("x.parquet")))


def test_shards_of_a_data_set_are_built_again_when_its_text_changes(datasets: dict, tmp_path: Path) -> None:
    section = CorpusSection(train="datasets:a/b", validation="datasets:a/b:test")
    for split, texts in (("train", ["one", "two"]), ("test", ["three"])):
        datasets["a/b", None, split] = FakeDataset({"text": texts})
    made = prepare_corpus(section, tmp_path)
    assert (made.train.manifest.documents, made.validation.text_bytes) == (2, 5)
    assert prepare_corpus(section, tmp_path, replace=False).train.hash == made.train.hash
    datasets["a/b", None, "train"] = FakeDataset({"text": ["one", "twin"]})
    with pytest.raises(ValueError, match="train was made of other text or settings"):
        prepare_corpus(section, tmp_path, replace=False)


def test_parquet_gives_the_shards_of_the_same_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    texts = [f"document {number} of many" for number in range(30)]
    (tmp_path / "val.txt").write_text("held out")
    for kind in ("parquet", "txt"):
        (tmp_path / kind).mkdir()
    table = arrow.table({"id": list(range(31)), "text": [*texts[:9], "  ", *texts[9:]]})
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "a.parquet", row_group_size=7)
    for number, text in enumerate(texts):
        (tmp_path / "txt" / f"{number:02d}.txt").write_text(text)
    made = [
        prepare_corpus(
            CorpusSection(train=str(tmp_path / kind), validation=str(tmp_path / "val.txt")),
            tmp_path / f"{kind}-out",
        ).train
        for kind in ("parquet", "txt")
    ]
    assert made[0].tokens(0, len(made[0])).tolist() == made[1].tokens(0, len(made[1])).tolist()
    assert made[0].manifest.documents == 30
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"bad\.parquet is damaged or not what its name says"):
        read_documents(tmp_path / "bad.parquet")
    pyarrow.parquet.write_table(arrow.table({"content": texts}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"""other\.parquet has no column "text", it has \['content'\]"""):
        read_documents(tmp_path / "other.parquet")
