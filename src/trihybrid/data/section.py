"""The recipe's section on data, and the step that turns it into shards and probes on disk."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .encode import encode_each
from .probes import RecallDocument, RecallSet, encode_probe, mix_documents, recall_documents
from .sentencepiece import open_tokenizer
from .shards import TokenShards, existing_shards, write_shards
from .text import read_documents, split_documents
from .tokens import TextTokenizer

MEASURED_DOCUMENTS = 64  # documents whose mean length says how many make up a fraction


class RecallSection(BaseModel):
    """Planted key-value documents: their shape, their share of training, their number in evaluation."""

    model_config = ConfigDict(extra="forbid")
    fraction: float = Field(default=0.3, ge=0, le=0.9, description="share of the training tokens, about")
    pairs: int = Field(default=16, ge=2, le=26, description="key-value pairs in a document")
    fewest_pairs: int = Field(
        default=2, ge=2, le=26, description="a training document has between this and `pairs` pairs; <= pairs"
    )
    rounds: int = Field(default=4, ge=2, le=64, description="rounds of all pairs, the planting included")
    values: int = Field(
        default=26, ge=2, le=26, description="letters that a value is drawn from: chance is 1 / values"
    )
    gap: int = Field(default=0, ge=0, le=65536, description="most filler characters between two rounds")
    joiner: Literal["", " "] = Field(
        default="", description="between key and value; a space for tokenizers that merge letters"
    )
    evaluation_documents: int = Field(default=64, ge=1, le=65536, description="documents of the evaluation")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.fewest_pairs > self.pairs:
            raise ValueError(
                f"recall.fewest_pairs is {self.fewest_pairs}, must not exceed recall.pairs ({self.pairs}): "
                "lower it or raise pairs"
            )
        return self


class DataSection(BaseModel):
    """Text, tokenizer and probes of a recipe."""

    model_config = ConfigDict(extra="forbid")
    source: str = Field(
        default="builtin",
        min_length=1,
        description='"builtin", a .txt or .jsonl file (also .xz, .gz), a .parquet file, a folder of those, or '
        "datasets:NAME[:SPLIT[:CONFIGURATION]]",
    )
    tokenizer: str = Field(
        default="bytes",
        min_length=1,
        description='"bytes", a tokenizer.json, a SentencePiece .model, or a folder that holds one',
    )
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of the documents kept for validation"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="decides the split, the probes and the order of documents"
    )
    recall: RecallSection = Field(default_factory=RecallSection, description="planted key-value documents")


@dataclass(frozen=True, eq=False)
class PreparedData:
    """What training and evaluation read.

    tokenizer: made of the section.
    train: text and recall documents, shuffled together.
    validation: text only.
    validation_documents: the text of `validation`, in its order.
    recall: probes for evaluation, never seen in training, in rows as long as the longest.
    """

    tokenizer: TextTokenizer
    train: TokenShards
    validation: TokenShards
    validation_documents: list[str]
    recall: RecallSet


def load_tokenizer(section: DataSection) -> TextTokenizer:
    """The section's tokenizer.

    Raises:
        ValueError: see `open_tokenizer`.
    """
    return open_tokenizer(section.tokenizer)


def prepare(section: DataSection, folder: str | Path, replace: bool = True) -> PreparedData:
    """Build the shards in `folder`/train and `folder`/validation, or re-use those made of the same input.

    Same input means equal tokenizer, texts and settings, by hash; shards of another input are replaced, with
    one log line, or refused where `replace` is False. Nothing is written before all text is read. Files that
    changed since they were written are an error, not a reason to rebuild. One process at a time may prepare a
    folder: with several ranks, the first prepares and the others then re-use.

    Raises:
        ValueError: for a bad source or tokenizer, shards that fail their check, or probes that the tokenizer
            cannot hold.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(section)
    training, validation = split_documents(
        read_documents(section.source), section.validation_fraction, section.seed
    )
    recall = _encode_evaluation(section, tokenizer)  # first: a tokenizer that cannot hold probes fails early

    mixture = section.recall.model_dump(exclude={"evaluation_documents"}) | {"seed": section.seed}
    train_hash = _hash_input(tokenizer, mixture, training)
    train = existing_shards(folder / "train", train_hash, replace)
    if train is None:
        train = _write(folder / "train", _with_recall(section, tokenizer, training), tokenizer, train_hash)
    validation_hash = _hash_input(tokenizer, {}, validation)
    held = existing_shards(folder / "validation", validation_hash, replace)
    if held is None:
        held = _write(folder / "validation", validation, tokenizer, validation_hash)
    return PreparedData(tokenizer, train, held, validation, recall)


def prepare_held_out(section: DataSection, folder: str | Path) -> PreparedData:
    """The same for measuring alone: all text is validation, and there is no training. ValueErrors as of `prepare`."""
    tokenizer, documents = load_tokenizer(section), read_documents(section.source)
    recall = _encode_evaluation(section, tokenizer)
    shards = _write(Path(folder) / "validation", documents, tokenizer, _hash_input(tokenizer, {}, documents))
    return PreparedData(tokenizer, shards, shards, documents, recall)


def _draw(section: DataSection, count: int, evaluation: bool) -> list[RecallDocument]:
    """Recall documents of training (sizes mixed) or of evaluation, from two seeds, so that they differ."""
    shape = section.recall
    seed = 2 * section.seed + evaluation
    fewest = shape.pairs if evaluation else shape.fewest_pairs
    return recall_documents(
        count, shape.pairs, shape.rounds, seed, shape.values, shape.gap, shape.joiner, fewest
    )


def _encode_evaluation(section: DataSection, tokenizer: TextTokenizer) -> RecallSet:
    documents = _draw(section, section.recall.evaluation_documents, evaluation=True)
    longest = max(len(tokenizer.encode(document.text)) for document in documents)
    return encode_probe(documents, tokenizer, longest + 1)


def _with_recall(section: DataSection, tokenizer: TextTokenizer, texts: list[str]) -> list[str]:
    """The texts with recall documents mixed in, up to the section's fraction of all tokens."""
    fraction = section.recall.fraction
    if fraction == 0:
        return mix_documents(texts, [], section.seed)
    text_tokens = sum(len(ids) + 1 for ids in encode_each(texts, tokenizer))
    sample = _draw(section, MEASURED_DOCUMENTS, evaluation=False)
    mean = sum(len(tokenizer.encode(document.text)) + 1 for document in sample) / len(sample)
    count = round(text_tokens * fraction / (1 - fraction) / mean)
    return mix_documents(texts, _draw(section, count, evaluation=False), section.seed)


def _hash_input(tokenizer: TextTokenizer, settings: dict[str, object], texts: list[str]) -> str:
    """sha256 (hex) of all that decides the content of the shards."""
    digest = hashlib.sha256(json.dumps([tokenizer.hash, settings], sort_keys=True).encode())
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _write(folder: Path, texts: list[str], tokenizer: TextTokenizer, source_hash: str) -> TokenShards:
    return write_shards(
        folder,
        encode_each(texts, tokenizer),
        tokenizer.vocab_size,
        tokenizer.bos_id,
        text_bytes=sum(len(text.encode()) for text in texts),
        tokenizer_hash=tokenizer.hash,
        source_hash=source_hash,
    )
