"""Documents to token streams, in one process or several, with the same result.

Texts go out in batches and come back in their order, so the number of processes changes nothing but the time.
Only a bounded number of batches is under way, so memory does not grow with the text. The processes are
spawned: a script that asks for several must be importable (`if __name__ == "__main__":`).
"""

import multiprocessing
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from .sentencepiece import open_tokenizer
from .shards import document_array
from .tokens import TextTokenizer

BATCH_CHARACTERS = 2**19
WAITING = 3  # batches under way for each process


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """Some documents, encoded.

    tokens_N: int64 [tokens], each document as BOS and its ids; the empty ones are left out.
    documents: number of documents in `tokens_N`.
    text_bytes: UTF-8 bytes of these documents.
    skipped: number of documents that the tokenizer turns into nothing (control characters alone, say).
    """

    tokens_N: np.ndarray
    documents: int
    text_bytes: int
    skipped: int


def encode_documents(
    documents: Iterable[str], tokenizer: TextTokenizer, processes: int = 1, skip: int = 0
) -> Iterator[EncodedBatch]:
    """Encode documents in their order.

    Args:
        documents: the texts, consumed as a stream.
        tokenizer: encodes them.
        processes: 1 encodes in this one, with a thread for each core; more in as many others, one thread each.
        skip: batches at the beginning that are read and not encoded.

    Raises:
        ValueError: for fewer than one process, an id out of range, BOS inside a document, or a process that died.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}, must be at least 1")
    batches = islice(_batches(documents), skip, None)
    if processes == 1:
        return (_encoded(tokenizer, first, texts, tokenizer.encode_many(texts)) for first, texts in batches)
    return _in_processes(batches, tokenizer, processes)


def encode_each(documents: Iterable[str], tokenizer: TextTokenizer) -> Iterator[list[int]]:
    """Ids of each document in its order, without BOS."""
    for _, texts in _batches(documents):
        yield from tokenizer.encode_many(texts)


def _in_processes(
    batches: Iterable[tuple[int, list[str]]], tokenizer: TextTokenizer, processes: int
) -> Iterator[EncodedBatch]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
        waiting: deque[Future[EncodedBatch]] = deque()
        try:
            for first, texts in batches:
                waiting.append(pool.submit(_encode_elsewhere, folder, first, texts))
                if len(waiting) > WAITING * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(
                f"one of {processes} encoding processes died, perhaps for lack of memory: use fewer processes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Number of the first document, and about `BATCH_CHARACTERS` of text."""
    first, texts, size = 0, [], 0
    for document in documents:
        texts.append(document)
        size += len(document)
        if size >= BATCH_CHARACTERS:
            yield first, texts
            first, texts, size = first + len(texts), [], 0
    if texts:
        yield first, texts


@lru_cache(maxsize=1)
def _load(folder: str) -> TextTokenizer:
    """The tokenizer in a folder, loaded once in each process."""
    return open_tokenizer(folder)


def _encode_elsewhere(folder: str, first: int, texts: Sequence[str]) -> EncodedBatch:
    tokenizer = _load(folder)
    # One by one: each of several processes has a core.
    return _encoded(tokenizer, first, texts, map(tokenizer.encode, texts))


def _encoded(
    tokenizer: TextTokenizer, first: int, texts: Sequence[str], ids_of_each: Iterable[list[int]]
) -> EncodedBatch:
    arrays, text_bytes = [], 0
    for number, (text, ids) in enumerate(zip(texts, ids_of_each, strict=True), start=first):
        if ids:
            arrays.append(document_array(ids, number, tokenizer.vocab_size, tokenizer.bos_id))
            text_bytes += len(text.encode())
    tokens_N = np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)
    return EncodedBatch(tokens_N, len(arrays), text_bytes, len(texts) - len(arrays))
