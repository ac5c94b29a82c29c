"""Text to token ids and back, with exact byte counts.

A thin wrapper over `tokenizers.Tokenizer` that settles three things: special strings inside a text are
ordinary text, a document begins with BOS by the caller's hand (`encode` adds nothing), and every id has a
known number of bytes. What `save` writes is what transformers loads; there BOS is prepended to prompts.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

_logger = logging.getLogger(__name__)

NOT_UNICODE = "the text holds bytes that are no UTF-8, or half of a pair of surrogates"
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
ROLES = ("bos_token", "eos_token", "pad_token")
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
"""The step of a decoder that drops the space which its tokenizer put before a text."""


class TextTokenizer(Protocol):
    """What the package needs of a tokenizer: `Tokenizer` and `SentencePieceTokenizer` both are one."""

    @property
    def vocab_size(self) -> int:
        """Largest id + 1: what an embedding table needs."""

    @property
    def bos_id(self) -> int:
        """Id that begins a document."""

    @property
    def eos_id(self) -> int:
        """Id that ends a generation."""

    @property
    def pad_id(self) -> int:
        """Id that fills a row."""

    @property
    def hash(self) -> str:
        """sha256 (hex) of what decides the ids: equal hash, equal ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added, and special strings in it are ordinary text."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on as many threads as there are cores."""

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with the half-open span of characters that each id came from."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""

    def bytes_of(self, ids: Sequence[int] | np.ndarray) -> int:
        """Number of bytes that the ids stand for, which for a document is the length of its decoded text."""

    def byte_rules(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64, bool, bool [vocabulary]: bytes of each id; whether a space comes before it; whether it is a
        border, after which that space is dropped (see `ByteTable`)."""

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, for `open_tokenizer`."""


class Tokenizer:
    """A tokenizer with BOS, EOS and padding.

    Args:
        backend: the tokenizer; truncation and padding are switched off, and if its post-processor does not
            put BOS first, one that does replaces it.
        bos, eos, pad: its special tokens, as text.

    Raises:
        ValueError: if one of the three is not in the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos: str, eos: str, pad: str) -> None:
        self._specials = dict(zip(ROLES, (bos, eos, pad), strict=True))
        self._ids: dict[str, int] = {}
        for role, token in self._specials.items():
            number = backend.token_to_id(token)
            if number is None:
                raise ValueError(
                    f"{role} {token!r} is not in the tokenizer's vocabulary: "
                    "name the right one in tokenizer_config.json"
                )
            self._ids[role] = number
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        if backend.encode("a", add_special_tokens=True).ids[0] != self.bos_id:
            backend.post_processor = beginning(bos, self.bos_id)
        backend.encode_special_tokens = True  # "<eos>" written in a text is five ordinary characters

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The byte tokenizer, 260 ids: pad 0, eos 1, bos 2, unk 3 (as in Gemma), byte b is b + 4."""
        characters = byte_characters()
        vocabulary = {special: number for number, special in enumerate(SPECIALS)}
        vocabulary |= {characters[byte]: byte + len(SPECIALS) for byte in range(256)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(
            [AddedToken(special, special=True, normalized=False) for special in SPECIALS]
        )
        return cls(backend, bos="<bos>", eos="<eos>", pad="<pad>")

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json, or the one in a folder.

        The names of BOS, EOS and padding come from the tokenizer_config.json beside it; what that does not name is
        the model's token of a config.json beside it (Qwen's documents begin with `<|endoftext|>`), else "<bos>",
        "<eos>" or "<pad>". A tokenizer without padding (Llama's, Mistral's) fills rows with EOS, which nothing reads.

        Raises:
            ValueError: if the file is missing, is no tokenizer, or lacks one of the three, or if what names them is no
                text.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f'tokenizer {file} does not exist: give "bytes", a tokenizer.json or its folder')
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
        names, model = (
            _json_object(file.with_name(name)) for name in ("tokenizer_config.json", "config.json")
        )
        model = model.get("text_config", model)
        found: dict[str, str] = {}
        for role, default in zip(ROLES, ("<bos>", "<eos>", "<pad>"), strict=True):
            token = names.get(role)
            if token is None and isinstance(model.get(f"{role}_id"), int):
                token = backend.id_to_token(model[f"{role}_id"])
                _logger.info("%s: %s is %s, by config.json", file, role, token)
            if token is None and role == "pad_token" and backend.token_to_id(default) is None:
                token = found["eos_token"]
                _logger.info("%s: no pad_token; rows are filled with %s", file, token)
            found[role] = _content(token or default, role, file)
        return cls(backend, found["bos_token"], found["eos_token"], found["pad_token"])

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: what an embedding table needs."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def bos_id(self) -> int:
        """Id that begins a document."""
        return self._ids["bos_token"]

    @property
    def eos_id(self) -> int:
        """Id that ends a generation."""
        return self._ids["eos_token"]

    @property
    def pad_id(self) -> int:
        """Id that fills a row."""
        return self._ids["pad_token"]

    @property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON of the tokenizer: equal hash, equal ids."""
        content = json.loads(self._backend.to_str())
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: nothing is added, and special strings in it are ordinary text."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(NOT_UNICODE) from None

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on as many threads as there are cores."""
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with the half-open span of characters that each id came from."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def bytes_of(self, ids: Sequence[int] | np.ndarray) -> int:
        """Number of bytes that the ids stand for; special tokens have none.

        For whole documents this is the UTF-8 length of the decoded text. It is the length of the text itself
        where the tokenizer loses nothing, as the byte tokenizer does.

        Raises:
            ValueError: for an id outside the vocabulary, or a tokenizer whose tokens have no fixed bytes.
        """
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(
                f"ids span {array.min()} to {array.max()}, the vocabulary 0 to {self.vocab_size - 1}"
            )
        base_V, lead_V, border_V = self._byte_columns
        before = np.concatenate([[self.bos_id], array[:-1]])[: array.size]
        return int((base_V[array] + (lead_V[array] & ~border_V[before])).sum())

    def byte_rules(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64, bool, bool [vocabulary]: bytes of each id without a space before it that the decoder may drop;
        whether there is such a space; whether the id is a border, after which it is dropped. Only decoders that
        strip the head of a text (Llama 2's, Mistral's) drop any: of the others the second and third are False.

        Raises:
            ValueError: for a tokenizer whose tokens have no fixed bytes.
        """
        return self._byte_columns

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, for `from_file` and transformers' AutoTokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config | self._specials, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @cached_property
    def _byte_columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `byte_rules`; by the rules of the tokenizer's decoder."""
        content = json.loads(self._backend.to_str())
        steps = content["decoder"] or {"type": "none"}
        steps = steps["decoders"] if steps["type"] == "Sequence" else [steps]
        kinds = [step["type"] for step in steps]
        specials = {token["id"] for token in content["added_tokens"] if token["special"]}
        old = new = ""
        stripped = False
        length: Callable[[str], int]
        if kinds[-1:] == ["Strip"] and steps[-1] == STRIP:
            stripped, kinds = True, kinds[:-1]
        if kinds == ["ByteLevel"] and not stripped:
            length = _byte_level_length
        elif kinds == ["Replace", "ByteFallback", "Fuse"] and "String" in steps[0]["pattern"]:
            length = _byte_fallback_length
            old, new = steps[0]["pattern"]["String"], steps[0]["content"]
        else:
            raise ValueError(
                f"the tokenizer's decoder {[step['type'] for step in steps]} has no fixed bytes for a token: bytes are "
                "known for ByteLevel and for Replace, ByteFallback, Fuse (Gemma), and one Strip behind them (Llama 2)"
            )
        base_V = np.zeros(self.vocab_size, dtype=np.int64)
        lead_V, border_V = (np.zeros(self.vocab_size, dtype=np.bool_) for _ in range(2))
        for token, number in self._backend.get_vocab(with_added_tokens=True).items():
            if number in specials:
                border_V[number] = stripped
                continue
            text = token.replace(old, new) if old else token
            lead_V[number] = stripped and text.startswith(" ")
            base_V[number] = length(text.removeprefix(" ") if lead_V[number] else text)
        return base_V, lead_V, border_V


def _json_object(file: Path) -> dict[str, Any]:
    """The fields of a JSON file; none where there is no such file."""
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is not a JSON object")
    return fields


def _content(token: Any, role: str, file: Path) -> str:
    """The text of a token, which transformers writes as a string or as an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(
            f"{file.with_name('tokenizer_config.json')}: {role} is {token!r:.80}; it must be a string, or an object "
            'with the string "content"'
        )
    return text


def beginning(bos: str, bos_id: int) -> processors.TemplateProcessing:
    """The post-processor that puts BOS before every text."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )


def byte_characters() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level BPE (the table of GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


BYTE_CHARACTERS = frozenset(byte_characters())


def _byte_level_length(token: str) -> int:
    # A token with a character outside the table (an added token) is taken by the decoder as it stands.
    return len(token) if BYTE_CHARACTERS.issuperset(token) else len(token.encode())


def _byte_fallback_length(token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return 1 if is_byte else len(token.encode())
