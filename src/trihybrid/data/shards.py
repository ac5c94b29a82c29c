"""Token shards: one stream of tokens on disk, read through memory maps and checked by hash.

The stream is BOS, document, BOS, document, ... cut into files of equal length (`00000.bin`, ...; raw
little-endian uint16 or uint32). `manifest.json` says what they hold and is written last, so that a folder
without it was never finished.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

logger = logging.getLogger(__name__)

FORMAT: Final = 1
MANIFEST = "manifest.json"
SHARD_NAME = r"[0-9]{5,}\.bin"
STORED: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CURE = "delete the folder and prepare the data again"
TOKENS_PER_SHARD = 2**24
BLOCK = 2**20  # tokens that `documents` holds at once, beside the longest document


class ShardEntry(BaseModel):
    """One shard file."""

    model_config = ConfigDict(extra="forbid")
    file: str = Field(pattern=f"^{SHARD_NAME}$", description="file name inside the folder")
    tokens: int = Field(ge=1, description="tokens in the file")
    bytes: int = Field(ge=1, description="size of the file")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hash of the file")


class Manifest(BaseModel):
    """What a folder of shards holds."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = Field(description="version of this layout")
    dtype: Literal["uint16", "uint32"] = Field(description="how a token is stored, little-endian")
    vocab_size: int = Field(ge=1, le=2**32, description="every token is below it")
    bos_id: int = Field(ge=0, description="the token that begins each document, and stands nowhere else")
    tokenizer_hash: str = Field(description="hash of the tokenizer that made the tokens")
    source_hash: str = Field(description="hash of what the tokens were made from, chosen by the caller")
    text_bytes: int = Field(ge=0, description="UTF-8 bytes of all documents")
    documents: int = Field(ge=1, description="number of documents")
    tokens: int = Field(ge=2, description="number of tokens, one BOS a document included")
    shards: list[ShardEntry] = Field(min_length=1, description="the files in the order of the stream")


def write_shards(
    folder: str | Path,
    documents_tokens: Iterable[Sequence[int]],
    vocab_size: int,
    bos_id: int,
    *,
    text_bytes: int,
    tokenizer_hash: str,
    source_hash: str = "",
    tokens_per_shard: int = TOKENS_PER_SHARD,
) -> "TokenShards":
    """Write documents as shards, each as BOS and its tokens.

    Args:
        folder: made if missing; shards of an earlier writing are replaced.
        documents_tokens: ids of each document without BOS; consumed as a stream.
        vocab_size: ids lie in 0..vocab_size - 1; up to 65,536 they take two bytes each, else four.
        bos_id: id put before each document.
        text_bytes: UTF-8 bytes of all documents together.
        tokenizer_hash, source_hash: kept in the manifest.
        tokens_per_shard: length of every file but the last, >= 1.

    Raises:
        ValueError: for no documents, an empty one, an id out of range or a BOS inside a document, or sizes
            out of range. The folder then has no manifest.
    """
    _check_ids(vocab_size, bos_id)
    arrays = (
        document_array(document, number, vocab_size, bos_id)
        for number, document in enumerate(documents_tokens)
    )
    return write_stream(
        folder,
        arrays,
        vocab_size,
        bos_id,
        text_bytes=lambda: text_bytes,
        tokenizer_hash=tokenizer_hash,
        source_hash=source_hash,
        tokens_per_shard=tokens_per_shard,
    )


def write_stream(
    folder: str | Path,
    arrays: Iterable[np.ndarray],
    vocab_size: int,
    bos_id: int,
    *,
    text_bytes: Callable[[], int],
    tokenizer_hash: str,
    source_hash: str = "",
    tokens_per_shard: int = TOKENS_PER_SHARD,
    done: Sequence[ShardEntry] = (),
    done_documents: int = 0,
    finished: Callable[[ShardEntry, int], None] | None = None,
) -> "TokenShards":
    """Write a stream that holds its BOS already, token by token as it is given.

    Args:
        folder: made if missing; shards of an earlier writing are replaced.
        arrays: integers [any length]; their concatenation is the stream. Consumed one at a time.
        vocab_size, bos_id, tokenizer_hash, source_hash, tokens_per_shard: as for `write_shards`.
        text_bytes: asked when the arrays are used up: UTF-8 bytes of all documents together.
        done, done_documents: full shards that stand in the folder already, and the BOS in them; `arrays` goes on
            behind them.
        finished: called with each further full shard once it is written, and with the BOS so far.

    Raises:
        ValueError: for a stream of fewer than two tokens or without BOS, an id out of range, or sizes out of
            range. The folder then has no manifest.
    """
    _check_ids(vocab_size, bos_id)
    if tokens_per_shard < 1:
        raise ValueError(f"tokens_per_shard is {tokens_per_shard}, must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    dtype: Literal["uint16", "uint32"] = "uint16" if vocab_size <= 2**16 else "uint32"
    checked = (_check_range(array, vocab_size).astype(STORED[dtype], copy=False) for array in arrays)
    entries, documents = list(done), done_documents
    for number, piece in enumerate(_pieces(checked, tokens_per_shard), start=len(done)):
        content = piece.tobytes()
        name = f"{number:05d}.bin"
        write_atomically(folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(ShardEntry(file=name, tokens=piece.size, bytes=len(content), sha256=digest))
        documents += int(np.count_nonzero(piece == bos_id))
        if finished is not None and piece.size == tokens_per_shard:
            finished(entries[-1], documents)
    tokens = sum(entry.tokens for entry in entries)
    if not documents or tokens < 2:
        raise ValueError(
            f"no documents to write into {folder}: the stream has {tokens} tokens, {documents} of them BOS ({bos_id})"
        )
    manifest = Manifest(
        format=FORMAT,
        dtype=dtype,
        vocab_size=vocab_size,
        bos_id=bos_id,
        tokenizer_hash=tokenizer_hash,
        source_hash=source_hash,
        text_bytes=text_bytes(),
        documents=documents,
        tokens=tokens,
        shards=entries,
    )
    write_atomically(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
    written = {entry.file for entry in entries}
    for file in folder.glob("*.bin"):
        # Only what an earlier writing left: somebody else's .bin, as the challenge's, stays.
        if re.fullmatch(SHARD_NAME, file.name) and file.name not in written:
            file.unlink()
    return TokenShards(folder, verify=False)


class TokenShards:
    """A stream of tokens on disk, read-only.

    Args:
        folder: what `write_shards` wrote.
        verify: also compare the sha256 of every file (sizes are always compared).

    Raises:
        ValueError: for a missing or malformed manifest, another format version, an unknown dtype, a file name
            with separators, a missing file, a wrong size or a wrong hash; it names what was expected and
            found.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder / MANIFEST)
        dtype = STORED[self.manifest.dtype]
        self._maps = []
        for entry in self.manifest.shards:
            file = self.folder / entry.file
            found = file.stat().st_size if file.is_file() else None
            if found != entry.bytes:
                raise ValueError(f"{file}: expected {entry.bytes} bytes, found {found or 'none'}; {CURE}")
            if verify:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if digest != entry.sha256:
                    raise ValueError(f"{file}: expected sha256 {entry.sha256}, found {digest}; {CURE}")
            # A plain view: slicing a memmap object costs several times as much.
            self._maps.append(np.memmap(file, dtype=dtype, mode="r").view(np.ndarray))
        self._borders = np.cumsum([0] + [entry.tokens for entry in self.manifest.shards])

    def __len__(self) -> int:
        """Tokens in the stream, one BOS a document included."""
        return self.manifest.tokens

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        return self.manifest.vocab_size

    @property
    def bos_id(self) -> int:
        """The token at the head of each document."""
        return self.manifest.bos_id

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return self.manifest.text_bytes

    @property
    def hash(self) -> str:
        """sha256 (hex) of the manifest, which holds the hash of every file."""
        content = json.dumps(self.manifest.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Copy of tokens start..stop - 1 of the stream, [stop - start], uint16 or uint32.

        Raises:
            ValueError: unless 0 <= start <= stop <= len(self).
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"tokens {start}..{stop} are not inside the stream of {len(self)} tokens")
        output = np.empty(stop - start, dtype=STORED[self.manifest.dtype])
        for part, (low, high) in zip(self._maps, pairwise(self._borders), strict=True):
            first, last = max(start, low), min(stop, high)
            if first < last:
                output[first - start : last - start] = part[first - low : last - low]
        return output

    def rows(self, starts_N: np.ndarray, length: int) -> np.ndarray:
        """Copy of `length` tokens from each start, [N, length], uint16 or uint32.

        Raises:
            ValueError: unless length >= 1 and every row lies inside the stream.
        """
        if length < 1 or (starts_N.size and (starts_N.min() < 0 or starts_N.max() + length > len(self))):
            raise ValueError(f"rows of {length} tokens leave the stream of {len(self)} tokens")
        output_NT = np.empty((starts_N.size, length), dtype=STORED[self.manifest.dtype])
        number_N = np.searchsorted(self._borders, starts_N, side="right") - 1
        local_N = starts_N - self._borders[number_N]
        for row_T, number, local in zip(output_NT, number_N.tolist(), local_N.tolist(), strict=True):
            inside = self._maps[number][local : local + length]
            if inside.size < length:  # the row goes on in the next file
                start = int(self._borders[number]) + local
                inside = self.tokens(start, start + length)
            row_T[:] = inside
        return output_NT

    def documents(self) -> Iterator[np.ndarray]:
        """Each document in its order, [1 + tokens] with its BOS, uint16 or uint32; what an imported stream has
        before its first BOS is the end of a document that it lacks, and is left out."""
        pending: list[np.ndarray] = []
        for start in range(0, len(self), BLOCK):
            block = self.tokens(start, min(start + BLOCK, len(self)))
            pieces = np.split(block, np.flatnonzero(block == self.bos_id))
            if pending:
                pending.append(pieces[0])
            for piece in pieces[1:]:
                if pending:
                    yield np.concatenate(pending)
                pending = [piece]
        if pending:
            yield np.concatenate(pending)


def existing_shards(folder: Path, source_hash: str, replace: bool) -> TokenShards | None:
    """The shards in a folder where they were made of this input; None, with one log line, where others may be replaced,
    or where there are none.

    Raises:
        ValueError: for shards that fail their check, or of another input where `replace` is False.
    """
    if not (folder / MANIFEST).exists():
        return None
    shards = TokenShards(folder)
    if shards.manifest.source_hash == source_hash:
        return shards
    if not replace:
        raise ValueError(
            f"{folder} was made of other text or settings; restore them, or start a new run directory"
        )
    logger.info("data: %s was made of other text or settings, building it again", folder)
    return None


def _check_ids(vocab_size: int, bos_id: int) -> None:
    if not 1 <= vocab_size <= 2**32 or not 0 <= bos_id < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size} and bos_id {bos_id}: needs 0 <= bos_id < vocab_size <= 2**32"
        )


def _check_range(array: np.ndarray, vocab_size: int) -> np.ndarray:
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(f"the stream has ids {array.min()} to {array.max()}, allowed 0 to {vocab_size - 1}")
    return array


def document_array(document: Sequence[int], number: int, vocab_size: int, bos_id: int) -> np.ndarray:
    """int64 [1 + tokens]: BOS and the checked ids."""
    array = np.asarray(document, dtype=np.int64)
    if array.size == 0:
        raise ValueError(f"document {number} has no tokens: leave it out")
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(
            f"document {number} has ids {array.min()} to {array.max()}, allowed 0 to {vocab_size - 1}"
        )
    if (array == bos_id).any():
        raise ValueError(f"document {number} holds BOS ({bos_id}) inside: encode it without special tokens")
    return np.concatenate([[bos_id], array])


def _pieces(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Cut the concatenation of the arrays into pieces of `length`, the last one shorter."""
    pending: list[np.ndarray] = []
    held = 0
    for array in arrays:
        pending.append(array)
        held += array.size
        while held >= length:
            flat = np.concatenate(pending)
            yield flat[:length]
            pending, held = [flat[length:]], held - length
    if held:
        yield np.concatenate(pending)


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file under another name and put it in its place, so that it is whole or not there."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _read_manifest(file: Path) -> Manifest:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: the folder holds no finished shards; {CURE}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; {CURE}") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT}, found {version!r}; {CURE}")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file}: {field} is {first['input']!r}: {first['msg']}; {CURE}") from None
    width = STORED[manifest.dtype].itemsize
    if any(entry.bytes != entry.tokens * width for entry in manifest.shards):
        raise ValueError(f"{file}: bytes of a shard are not its tokens times {width}; {CURE}")
    if manifest.tokens != sum(entry.tokens for entry in manifest.shards):
        raise ValueError(f"{file}: tokens is {manifest.tokens}, the shards hold another number; {CURE}")
    return manifest
