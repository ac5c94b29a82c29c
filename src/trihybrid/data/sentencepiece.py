"""SentencePiece models as tokenizers, and opening any tokenizer by name.

SentencePiece normalises a text before it cuts it (its model file says how), so decoding gives the normalised
text. What is counted as bytes is that decoded text; the raw bytes are counted beside it.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .byte_table import ByteTable
from .tokens import TextTokenizer, Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
MODEL = "tokenizer.model"


class SentencePieceTokenizer:
    """A SentencePiece model with BOS, EOS and padding; nothing but its bytes decides what it does.

    Args:
        content: bytes of the .model file.
        name: what error messages call it.

    Raises:
        ValueError: if the library is missing, the bytes are no model, or the model lacks one of the three
            tokens or a piece for a lone space.
    """

    def __init__(self, content: bytes, name: str = "the SentencePiece model") -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ValueError(f"{name} needs the sentencepiece library: pip install trihybrid[data]") from None
        self._content = content
        self._name = name
        try:
            self._processor: Any = SentencePieceProcessor(model_proto=content)
            size = self._processor.get_piece_size() if content else 0
        except (RuntimeError, OSError):  # what the library raises for bytes that it cannot parse
            size = 0
        if not size:
            raise ValueError(f"{name} is not a SentencePiece model: give the .model file of its trainer")
        for role, number in (("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)):
            if number < 0:
                raise ValueError(
                    f"{name} has no {role} token: train it with --{role}_id (the challenge's are "
                    "pad 0, bos 1, eos 2, unk 3)"
                )
        if self._processor.piece_to_id(SPACE) == self._processor.unk_id():
            raise ValueError(
                f"{name} has no piece for a lone space, and would count it as three bytes: train it on text in "
                "which spaces stand alone, or add the piece to user_defined_symbols"
            )

    def __reduce__(self) -> tuple[type["SentencePieceTokenizer"], tuple[bytes, str]]:
        """To another process it goes as the bytes of its model."""
        return type(self), (self._content, self._name)

    @classmethod
    def from_file(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Load a .model file, or the tokenizer.model in a folder.

        Raises:
            ValueError: if the file is missing or does not serve; see the class.
        """
        file = Path(path)
        if file.is_dir():
            file = file / MODEL
        if not file.is_file():
            raise ValueError(f"tokenizer {file} does not exist: give a SentencePiece .model or its folder")
        return cls(file.read_bytes(), str(file))

    @property
    def vocab_size(self) -> int:
        """Number of pieces: what an embedding table needs."""
        return self._processor.get_piece_size()

    @property
    def bos_id(self) -> int:
        """Id that begins a document."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """Id that ends a generation."""
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        """Id that fills a row."""
        return self._processor.pad_id()

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the model file: equal hash, equal ids."""
        return hashlib.sha256(self._content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added, and special strings in it are ordinary text."""
        return self._processor.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on as many threads as there are cores."""
        return self._processor.encode(list(texts))

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with the half-open span of characters that each id came from; of the bytes that spell one
        character, the last has its span."""
        found = self._processor.encode(text, return_type="offset_mapping")
        return found["ids"], found["offsets"]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        try:
            return self._processor.decode(np.asarray(ids, dtype=np.int64).tolist())
        except IndexError:
            raise ValueError(
                f"ids span {min(ids)} to {max(ids)}, the vocabulary 0 to {self.vocab_size - 1}"
            ) from None

    def bytes_of(self, ids: Sequence[int] | np.ndarray) -> int:
        """Number of bytes that the ids stand for, as the beginning of a document.

        For whole documents this is the UTF-8 length of the decoded text; see `byte_rules`.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64)
        return self._byte_table.count(array, np.concatenate([[self.bos_id], array[:-1]])[: array.size])

    def byte_rules(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64, bool, bool [vocabulary]: bytes of each piece without its leading space; whether it has one;
        whether it is a border (control, unknown or unused), after which that space is dropped.

        The rules of the parameter-golf challenge. Theirs leaves open what a mark inside a piece counts, since its
        models have none: here it is the one space that it decodes to.
        """
        table = self._byte_table
        return table.base_V, table.lead_V, table.border_V

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.model, for `from_file`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(self._content)

    @cached_property
    def _byte_table(self) -> ByteTable:
        base_V = np.zeros(self.vocab_size, dtype=np.int64)
        lead_V = np.zeros(self.vocab_size, dtype=np.bool_)
        border_V = np.zeros(self.vocab_size, dtype=np.bool_)
        model = self._processor
        for number in range(self.vocab_size):
            if model.is_control(number) or model.is_unknown(number) or model.is_unused(number):
                border_V[number] = True
            elif model.is_byte(number):
                base_V[number] = 1
            else:
                piece: str = model.id_to_piece(number)
                lead_V[number] = piece.startswith(SPACE)
                base_V[number] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
        return ByteTable(base_V, lead_V, border_V)


def open_tokenizer(name: str | Path) -> TextTokenizer:
    """The tokenizer of this name.

    Args:
        name: "bytes", a tokenizer.json, a SentencePiece .model, or a folder with a tokenizer.json or else a
            tokenizer.model.

    Raises:
        ValueError: if there is no such file, or it does not serve.
    """
    if name == "bytes":
        return Tokenizer.bytes()
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f'tokenizer {path} does not exist: give "bytes", a tokenizer.json, a SentencePiece .model, or a folder'
        )
    if path.suffix == ".model" or (not (path / "tokenizer.json").exists() and (path / MODEL).exists()):
        return SentencePieceTokenizer.from_file(path)
    return Tokenizer.from_file(path)
