"""Training and validation shards of a compact model, made of whatever text or tokens a recipe names.

A source is text (encoded into the folder), token files of the challenge (imported into the folder), or shards
that are there already (used where they are). Validation is a source of its own, comes with the training source,
or is split off it. What was made of the same input is found by its hash and used again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from .byte_table import byte_lengths, check_table
from .challenge import Split, challenge_files, import_challenge
from .columns import is_dataset
from .encode import BATCH_CHARACTERS, EncodedBatch, encode_documents
from .journal import JOURNAL, Journal, Mark
from .probes import mix_documents
from .progress import DocumentProgress
from .sentencepiece import open_tokenizer
from .shards import MANIFEST, TOKENS_PER_SHARD, ShardEntry, TokenShards, existing_shards, write_stream
from .text import (
    TRAINING,
    VALIDATION,
    assign_documents,
    document_files,
    hash_documents,
    read_documents,
    stream_documents,
    text_suffix,
)
from .tokens import TextTokenizer

logger = logging.getLogger(__name__)

Part = Literal["train", "validation"]
SPLITS: dict[Part, Split] = {"train": "train", "validation": "val"}
SIDES: dict[Part, int] = {"train": TRAINING, "validation": VALIDATION}


class CorpusSection(BaseModel):
    """Text and tokenizer of a compact model."""

    model_config = ConfigDict(extra="forbid")
    train: str = Field(
        default="builtin",
        min_length=1,
        description='"builtin", a .txt or .jsonl file (also .xz, .gz), a .parquet file, a folder of those, of our '
        "shards, or of the challenge's token files, or datasets:NAME[:SPLIT[:CONFIGURATION]]",
    )
    validation: str | None = Field(
        default=None,
        min_length=1,
        description="a source like `train`, whose files are then left out of `train`; null takes what lies beside "
        "the training shards, or splits the text",
    )
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="share of the documents split off, where `validation` is null"
    )
    tokenizer: str = Field(
        default="bytes",
        min_length=1,
        description='"bytes", a tokenizer.json, a SentencePiece .model, or a folder that holds one',
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="decides the split, and the order of the builtin documents"
    )


@dataclass(frozen=True, eq=False)
class Corpus:
    """What a compact model trains on and is measured on.

    tokenizer: made of the section.
    train, validation: the two streams; the byte table is right for every document of `validation`.
    """

    tokenizer: TextTokenizer
    train: TokenShards
    validation: TokenShards


@dataclass(frozen=True)
class _Source:
    """Where one part comes from; `divided` says that the other part is split off the same documents, `without`
    which files (resolved) belong to the other part though they lie in this place."""

    kind: Literal["text", "challenge", "shards"]
    place: str
    divided: bool = False
    without: frozenset[Path] = frozenset()


def prepare_corpus(
    section: CorpusSection, folder: str | Path, processes: int = 1, replace: bool = True
) -> Corpus:
    """Build the shards in `folder`/train and `folder`/validation, or use again those made of the same input.

    Same input means equal tokenizer, settings and files, by hash. A part of another input is built again, with one
    log line, or refused where `replace` is False. A part is complete or has no manifest, whenever the building was
    interrupted; the next call then goes on behind its finished shards, and folders that hold none of them are gone
    again. One process at a time may prepare a folder: with several ranks, the first prepares and the others then read.

    Args:
        section: what to build.
        folder: where shards go.
        processes: that encode text; the result is the same for any number.
        replace: whether shards of another input may be replaced.

    Raises:
        ValueError: for a bad source or tokenizer, shards that fail their check or belong to another tokenizer, or
            a validation document whose bytes the byte table counts wrong.
    """
    folder = Path(folder)
    tokenizer = open_tokenizer(section.tokenizer)
    byte_lengths(tokenizer)  # first: a tokenizer whose bytes cannot be counted fails before the work
    sources = _sources(section)
    with _no_remains(folder):
        held = _part("validation", sources["validation"], section, tokenizer, folder, processes, replace)
        train = _part("train", sources["train"], section, tokenizer, folder, processes, replace)
    return Corpus(tokenizer, train, held)


@contextmanager
def _no_remains(folder: Path) -> Iterator[None]:
    """After an error, remove the folders made since then that hold nothing for the next call to go on from."""
    parts = [folder / part for part in SPLITS if not (folder / part).exists()]
    around = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:  # an interrupted build too
        for part in parts:
            if part.exists() and not any((part / name).exists() for name in (MANIFEST, JOURNAL)):
                shutil.rmtree(part)
        for place in around:
            if place.exists() and not any(place.iterdir()):
                place.rmdir()
        raise


def _sources(section: CorpusSection) -> dict[Part, _Source]:
    """Where the two parts come from."""
    train = _source(section.train, "train")
    if section.validation is not None:
        validation = _source(section.validation, "validation")
        if validation.kind != "challenge" and Path(validation.place).resolve() == Path(train.place).resolve():
            raise ValueError(
                f"train and validation are both {validation.place}: name other text for one of them, or set "
                "validation to null, which splits train"
            )
        if train.kind == validation.kind == "text" and _files(train) and _files(validation):
            held = frozenset(file.resolve() for file in document_files(validation.place))
            train = _Source("text", train.place, without=held)
        return {"train": train, "validation": validation}
    if train.kind == "text":
        divided = _Source("text", train.place, divided=True)
        return {"train": divided, "validation": divided}
    beside = _source(section.train, "validation")
    # Without a part of its own the folder would be taken whole, and training text would be scored.
    if beside.kind == "text" or (beside.kind == "shards" and beside.place == train.place):
        raise ValueError(
            f"validation is null, and {section.train} holds tokens of training alone: "
            "name the validation text or tokens"
        )
    return {"train": train, "validation": beside}


def _source(place: str, part: Part) -> _Source:
    """What a source is, by what lies there."""
    path = Path(place)
    if (path / part / MANIFEST).is_file():
        return _Source("shards", str(path / part))
    if (path / MANIFEST).is_file():
        return _Source("shards", place)
    if path.is_dir() and challenge_files(path, SPLITS[part]):
        return _Source("challenge", place)
    return _Source("text", place)


def _part(
    part: Part,
    source: _Source,
    section: CorpusSection,
    tokenizer: TextTokenizer,
    folder: Path,
    processes: int,
    replace: bool,
) -> TokenShards:
    """One part, found or built; a validation part is checked against the byte table before it counts as built."""
    if source.kind == "shards":
        shards = TokenShards(source.place)
        if shards.manifest.tokenizer_hash != tokenizer.hash:
            raise ValueError(
                f"{source.place} was made with another tokenizer than {section.tokenizer}: name the one that made "
                "it, or give the text"
            )
        if part == "validation":
            check_table(shards, tokenizer)
        return shards
    target = folder / part
    source_hash = _hash_source(part, source, section, tokenizer)
    if (found := existing_shards(target, source_hash, replace)) is not None:
        return found
    if source.kind == "challenge":
        shards = import_challenge(source.place, SPLITS[part], target, tokenizer, source_hash)
    else:
        shards = _encode(part, source, section, tokenizer, target, processes, source_hash)
    if part == "validation":
        try:
            check_table(shards, tokenizer)
        except BaseException:  # an interrupted check is no check either
            (target / MANIFEST).unlink()
            raise
    return shards


def _encode(
    part: Part,
    source: _Source,
    section: CorpusSection,
    tokenizer: TextTokenizer,
    target: Path,
    processes: int,
    source_hash: str,
) -> TokenShards:
    journal = Journal(target, _build(source_hash))
    last = journal.marks[-1] if journal.marks else None
    before = _Before(last.batches, last.text_bytes, last.skipped) if last else _Before()
    begun = [mark.shard for mark in journal.marks]
    written = sum(shard.tokens for shard in begun)
    counted = EncodedBatch(np.empty(0, np.int64), 0, 0, 0)
    start = written - (last.offset if last else 0)

    def arrays() -> Iterator[np.ndarray]:
        nonlocal before, counted, start
        drop = written - start
        with DocumentProgress(part) as progress:
            documents = _documents(part, source, section)
            for number, batch in enumerate(encode_documents(documents, tokenizer, processes, before.batches)):
                if number:
                    before = before.behind(counted)
                    start += counted.tokens_N.size
                counted = batch
                progress.add(batch.documents + batch.skipped, batch.text_bytes, batch.tokens_N.size)
                yield batch.tokens_N[drop:]
                drop = 0
            before = before.behind(counted)

    def finished(shard: ShardEntry, documents: int) -> None:
        nonlocal written
        written += shard.tokens
        journal.add(
            Mark(
                shard=shard,
                documents=documents,
                batches=before.batches,
                offset=written - start,
                text_bytes=before.text_bytes,
                skipped=before.skipped,
            )
        )

    shards = write_stream(
        target,
        arrays(),
        tokenizer.vocab_size,
        tokenizer.bos_id,
        text_bytes=lambda: before.text_bytes,
        tokenizer_hash=tokenizer.hash,
        source_hash=source_hash,
        tokens_per_shard=TOKENS_PER_SHARD,
        done=begun,
        done_documents=last.documents if last else 0,
        finished=finished,
    )
    journal.close()
    if before.skipped:
        logger.warning("data: %s leaves out %d documents that encode to nothing", part, before.skipped)
    return shards


@dataclass(frozen=True)
class _Before:
    """What the batches before one amount to."""

    batches: int = 0
    text_bytes: int = 0
    skipped: int = 0

    def behind(self, batch: EncodedBatch) -> "_Before":
        """The same with one batch more."""
        return _Before(self.batches + 1, self.text_bytes + batch.text_bytes, self.skipped + batch.skipped)


def _build(source_hash: str) -> str:
    """Hash of what decides the bytes of shards and where batches end."""
    return hashlib.sha256(f"{source_hash} {BATCH_CHARACTERS} {TOKENS_PER_SHARD}".encode()).hexdigest()


def _documents(part: Part, source: _Source, section: CorpusSection) -> Iterator[str]:
    """Texts of one part, in the order given; the builtin ones, which are sorted by topic, are shuffled."""
    if not source.divided:
        return _stream(source, section)
    sides = assign_documents(_stream(source, section), section.validation_fraction, section.seed)
    documents = zip(_stream(source, section), sides, strict=True)
    return (document for document, side in documents if side == SIDES[part])


def _stream(source: _Source, section: CorpusSection) -> Iterator[str]:
    if source.place == "builtin":
        return iter(mix_documents(read_documents("builtin"), [], section.seed))
    return stream_documents(source.place, source.without)


def _files(source: _Source) -> bool:
    """Whether the text of a source lies in files that a user names."""
    return source.place != "builtin" and not is_dataset(source.place)


def _hash_source(part: Part, source: _Source, section: CorpusSection, tokenizer: TextTokenizer) -> str:
    """sha256 (hex) of all that decides the content of one part: the files by their hash and
    kind, not by their names."""
    settings: dict[str, object] = {"part": part, "kind": source.kind}
    if source.divided:
        settings |= {"validation_fraction": section.validation_fraction, "seed": section.seed}
    if source.place == "builtin":
        digest = hashlib.sha256("\0".join(read_documents("builtin")).encode())
        hashes = [digest.hexdigest()]
        settings["seed"] = section.seed
    elif is_dataset(source.place):
        hashes = [hash_documents(stream_documents(source.place))]
    elif source.kind == "challenge":
        hashes = [_hash_file(file) for file in challenge_files(source.place, SPLITS[part])]
    else:
        hashes = [
            text_suffix(file) + _hash_file(file) for file in document_files(source.place, source.without)
        ]
    return hashlib.sha256(json.dumps([tokenizer.hash, settings, hashes], sort_keys=True).encode()).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
