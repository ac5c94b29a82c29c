"""Documents: where text comes from, and how it is divided into training and validation text.

A document is one `str` that holds something besides whitespace and encodes to UTF-8. A file's text is taken
as it is (line ends too; only a leading byte-order mark goes), so that raw bytes can be counted exactly.
"""

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from .builtin import python_documentation
from .columns import dataset_texts, is_dataset, parquet_texts

PARQUET = ".parquet"
SUFFIXES = (".jsonl", PARQUET, ".txt")
COMPRESSIONS = (".gz", ".xz")
KINDS = "a .txt or .jsonl file (or one of these with .xz or .gz), a .parquet file"
REPEATED, TRAINING, VALIDATION = 0, 1, 2


def read_documents(source: str | Path) -> list[str]:
    """Read all documents of a source, in a fixed order.

    Args:
        source: "builtin" (the documentation that Python carries), a .txt file (one document), a .jsonl file
            (one JSON object with a string "text" a line; blank lines are skipped), one of these compressed
            (.xz or .gz behind the name), a .parquet file with a column "text", or a folder of those, searched
            recursively in sorted order; or "datasets:NAME[:SPLIT[:CONFIGURATION]]", see `dataset_texts`.

    Raises:
        ValueError: in one line, for a missing path, another kind of file, a damaged one, no text, an empty
            document, bytes that are not UTF-8, a line that is not a JSON object, or one without "text".
    """
    return list(stream_documents(source))


def stream_documents(source: str | Path, without: Collection[Path] = ()) -> Iterator[str]:
    """As `read_documents`, but one document at a time: memory holds the longest line or .txt file only.

    Args:
        source: as for `read_documents`.
        without: resolved paths of files to leave out.

    Raises:
        ValueError: at once for a missing path or another kind of file, and else as `read_documents` when the
            reading comes to it.
    """
    if source == "builtin":
        return iter(python_documentation())
    if is_dataset(source):
        return (_document(where, text) for where, text in dataset_texts(str(source)))
    return _stream(source, document_files(source, without))


def document_files(source: str | Path, without: Collection[Path] = ()) -> list[Path]:
    """The files that `stream_documents` reads, in its order; none for an empty folder.

    Raises:
        ValueError: for a missing path or another kind of file.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if text_suffix(file) in SUFFIXES and file.is_file())
        return [file for file in files if file.resolve() not in without]
    if not path.exists():
        raise ValueError(f'source {path} does not exist: give "builtin", {KINDS}, or a folder of them')
    if text_suffix(path) not in SUFFIXES:
        raise ValueError(f"source {path} is neither a folder nor {KINDS}: rename or convert it")
    return [] if path.resolve() in without else [path]


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
    documents = list(documents)
    sides = assign_documents(documents, validation_fraction, seed)
    train = [document for document, side in zip(documents, sides, strict=True) if side == TRAINING]
    return train, [document for document, side in zip(documents, sides, strict=True) if side == VALIDATION]


def assign_documents(documents: Iterable[str], validation_fraction: float, seed: int) -> np.ndarray:
    """The side of each document, as `split_documents` divides them, without holding their text.

    Args:
        documents, validation_fraction, seed: as for `split_documents`; the documents are consumed one at a
            time, and 16 bytes of hash are held of each.

    Returns:
        uint8 [documents]: 0 (equal to an earlier one), 1 (training) or 2 (validation).

    Raises:
        ValueError: if the fraction is out of range, or fewer than two distinct documents are there.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction is {validation_fraction}, must lie between 0 and 1, both excluded"
        )
    digests = bytearray()
    for document in documents:
        digests += hashlib.blake2b(document.encode(), digest_size=16).digest()
    _, first = np.unique(np.frombuffer(digests, dtype="S16"), return_index=True)
    first.sort()
    if first.size < 2:
        raise ValueError(
            f"the source holds {first.size} distinct document(s), validation needs at least 2: "
            "give a folder of several .txt files or a .jsonl file of several lines"
        )
    count = min(max(1, round(validation_fraction * first.size)), first.size - 1)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(first.size)
    sides = np.full(len(digests) // 16, REPEATED, dtype=np.uint8)
    sides[first] = TRAINING
    sides[first[order[:count]]] = VALIDATION
    return sides


def hash_documents(documents: Iterable[str]) -> str:
    """sha256 (hex) of documents in their order, consumed as a stream."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def text_suffix(file: Path) -> str:
    """What a file says that it is: ".txt", ".jsonl" or another, without the compression's."""
    return Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix


def _stream(source: str | Path, files: list[Path]) -> Iterator[str]:
    empty = True
    for file in files:
        for document in _read_file(file):
            empty = False
            yield document
    if empty:
        raise ValueError(
            f"source {source} holds no text: it needs at least one non-empty .txt, .jsonl or .parquet file"
        )


def _read_file(file: Path) -> Iterator[str]:
    if file.suffix == PARQUET:
        for where, text in parquet_texts(file):
            yield _document(where, text)
        return
    try:
        with _open(file) as stream:
            if text_suffix(file) == ".txt":
                text = _decode(file, stream.read(), 0)
                if not text.strip():
                    raise ValueError(f"{file} is empty text: remove it or fill it")
                yield text
                return
            offset = 0
            # Lines of bytes end at "\n" alone; str.splitlines would also cut at U+2028, which JSON allows.
            for number, line in enumerate(stream, start=1):
                text = _decode(file, line, offset)
                offset += len(line)
                if text.strip():
                    yield _read_line(f"{file}:{number}", text)
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file} is damaged or not what its name says: {error}; get it again") from None


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    return cast(BinaryIO, gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _decode(file: Path, content: bytes, offset: int) -> str:
    """Text of the bytes that stand at `offset` of the file, without a byte-order mark at its head."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{content[error.start]:02x} at offset {offset + error.start}; "
            "convert the file to UTF-8"
        ) from None
    return text if offset else text.removeprefix("\ufeff")


def _read_line(where: str, line: str) -> str:
    """The "text" of one JSON line; `where` is "file:line" for the error."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where} has no string "text": each line must be an object like {{"text": "..."}}')
    return _document(where, record["text"])


def _document(where: str, text: str) -> str:
    """A text that may be a document; `where` is its place for the error."""
    if not text.strip():
        raise ValueError(f'{where} has an empty "text": remove it')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'{where} has half a surrogate pair at character {error.start} of "text"') from None
    return text
