"""Text in columns: Parquet files, and data sets that the package `datasets` knows by name.

Both hold their documents in a column of strings called "text"; rows of whitespace are left out, as blank lines of a
.jsonl file are. The packages that read them are an extra.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMN = "text"
PREFIX = "datasets:"
ROWS = 1024  # rows of a Parquet file that are read at once


def is_dataset(source: str | Path) -> bool:
    """Whether a source names a data set: "datasets:NAME[:SPLIT[:CONFIGURATION]]"."""
    return str(source).startswith(PREFIX)


def parquet_texts(file: Path) -> Iterator[tuple[str, str]]:
    """Each document of a Parquet file, with its place ("file:row", from 0), in their order.

    Raises:
        ValueError: pyarrow is not installed; the file is damaged, or has no column "text" of strings without gaps.
    """
    parquet = _package("pyarrow.parquet", "Parquet files")
    arrow = _package("pyarrow", "Parquet files")
    try:
        with parquet.ParquetFile(file) as opened:
            if COLUMN not in opened.schema_arrow.names:
                raise ValueError(f'{file} has no column "{COLUMN}", it has {opened.schema_arrow.names}')
            number = 0
            for batch in opened.iter_batches(batch_size=ROWS, columns=[COLUMN]):
                for text in batch.column(0).to_pylist():
                    if _holds_text(f"{file}:{number}", text):
                        yield f"{file}:{number}", text
                    number += 1
    except arrow.ArrowException as error:
        raise ValueError(f"{file} is damaged or not what its name says: {error}; get it again") from None


def dataset_texts(source: str) -> Iterator[tuple[str, str]]:
    """Each document of a data set, with its place ("datasets:NAME:row", from 0), in their order.

    Args:
        source: see `is_dataset`; NAME is that of a hub or a local folder, SPLIT is "train" if not given.

    Raises:
        ValueError: datasets is not installed; there is no such data set, split or configuration; no column "text".
    """
    name, split, configuration = (*source.removeprefix(PREFIX).split(":"), "", "")[:3]
    if not name or source.count(":") > 3:
        raise ValueError(f'source {source}: give "{PREFIX}NAME", and behind it ":SPLIT" and ":CONFIGURATION"')
    package = _package("datasets", "a data set by its name")
    try:
        rows: Any = package.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"source {source}: datasets cannot load it: {error}") from error
    if COLUMN not in rows.column_names:
        raise ValueError(f'source {source} has no column "{COLUMN}", it has {rows.column_names}')
    for number, row in enumerate(rows.select_columns([COLUMN])):
        where = f"{PREFIX}{name}:{number}"
        if _holds_text(where, row[COLUMN]):
            yield where, row[COLUMN]


def _holds_text(where: str, text: Any) -> bool:
    if not isinstance(text, str):
        raise ValueError(f'{where} has no string in its column "{COLUMN}"')
    return bool(text.strip())


def _package(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{name.partition('.')[0]} is needed for {purpose} and not installed ({error}); "
            "pip install 'trihybrid[data]'"
        ) from error
