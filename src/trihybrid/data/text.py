"""Documents: where text comes from, and how it is divided into training and validation text.

A document is one `str` that holds something besides whitespace and encodes to UTF-8. A file's text is taken
as it is (line ends too; only a leading byte-order mark goes), so that raw bytes can be counted exactly.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .builtin import python_documentation

SUFFIXES = (".jsonl", ".txt")


def read_documents(source: str | Path) -> list[str]:
    """Read all documents of a source, in a fixed order.

    Args:
        source: "builtin" (the documentation that Python carries), a .txt file (one document), a .jsonl file
            (one JSON object with a string "text" a line; blank lines are skipped), or a folder of those,
            searched recursively in sorted order.

    Raises:
        ValueError: in one line, for a missing path, another kind of file, no text, an empty document, bytes
            that are not UTF-8, a line that is not a JSON object, or one without "text".
    """
    if source == "builtin":
        return python_documentation()
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    elif not path.exists():
        raise ValueError(
            f'source {path} does not exist: give "builtin", a .txt or .jsonl file, or a folder of them'
        )
    elif path.suffix in SUFFIXES:
        files = [path]
    else:
        raise ValueError(f"source {path} is neither a folder nor a .txt or .jsonl file: rename or convert it")
    documents = [document for file in files for document in _read_file(file)]
    if not documents:
        raise ValueError(f"source {path} holds no text: it needs at least one non-empty .txt or .jsonl file")
    return documents


def deduplicate(documents: Iterable[str]) -> list[str]:
    """The distinct documents in their first order; two are one if they are equal to the character."""
    return list(dict.fromkeys(documents))


def split_documents(
    documents: Iterable[str], validation_fraction: float, seed: int
) -> tuple[list[str], list[str]]:
    """Divide by document, after exact deduplication, so that no validation document was trained on.

    Args:
        documents: the texts.
        validation_fraction: share of the distinct documents (not of the bytes) for validation, in (0, 1); at
            least one document goes to each side.
        seed: chooses which, >= 0.

    Returns:
        Training and validation documents, each in the order given.

    Raises:
        ValueError: if the fraction is out of range, or fewer than two distinct documents are there.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}, must lie between 0 and 1, both excluded"
        )
    distinct = deduplicate(documents)
    if len(distinct) < 2:
        raise ValueError(
            f"the source holds {len(distinct)} distinct document(s), validation needs at least 2: "
            "give a folder of several .txt files or a .jsonl file of several lines"
        )
    count = min(max(1, round(validation_fraction * len(distinct))), len(distinct) - 1)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(distinct))
    chosen = set(order[:count].tolist())
    train = [document for number, document in enumerate(distinct) if number not in chosen]
    return train, [distinct[number] for number in sorted(chosen)]


def _read_file(file: Path) -> list[str]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert the file to UTF-8"
        ) from None
    if file.suffix == ".txt":
        if not text.strip():
            raise ValueError(f"{file} is empty text: remove it or fill it")
        return [text]
    # str.splitlines would also cut at U+2028, which JSON allows inside a string.
    lines = enumerate(text.split("\n"), start=1)
    return [_read_line(f"{file}:{number}", line) for number, line in lines if line.strip()]


def _read_line(where: str, line: str) -> str:
    """The "text" of one JSON line; `where` is "file:line" for the error."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where} has no string "text": each line must be an object like {{"text": "..."}}')
    text: str = record["text"]
    if not text.strip():
        raise ValueError(f'{where} has an empty "text": remove the line')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'{where} has half a surrogate pair at character {error.start} of "text"') from None
    return text
