"""Bits per byte of a compact model over a packed stream of tokens: BOS, document, BOS, document, ...

Every token of the stream but the first is a target once, BOS too, as the parameter-golf challenge counts: predicting a
BOS costs nats and stands for no byte. Three ways to give the model its context:

- chunked: windows side by side; a token sees what its window holds of it;
- sliding: windows that overlap, of which only the last `stride` targets count, so that nearly all have long contexts;
- stateful: the model's states carried from block to block, so that a token sees all that the mixers remember.

`isolated` says whether a document may see the one before it. Without, a window is one flat document to the model, which
is the challenge's own evaluation; with it, positions restart at every BOS.

Legend: B rows, T time, S scored targets of a window, N targets, D model width, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trihybrid.data import TokenShards
from trihybrid.evaluate.scoring import evaluation_mode
from trihybrid.mixers.span import Span, contiguous, packed
from trihybrid.models.compact import CompactModel

LOGIT_ELEMENTS = 2**24
"""Logits that are held at a time: 64 MiB of float32."""

READ_TOGETHER = 32
"""Batches whose sums are read at once: to read makes the host wait for the device, and the device then for the host."""

COUNTED_TOKENS = 2**20
"""Tokens whose bytes are counted at a time, so that a table's temporary arrays stay small."""


class ByteCounter(Protocol):
    """What knows how many bytes of text tokens stand for."""

    def count(self, targets_N: np.ndarray, previous_N: np.ndarray) -> int:
        """UTF-8 bytes of the targets, each after its previous token (both int64 [N])."""
        ...


@dataclass(frozen=True)
class StreamScore:
    """A stream, scored.

    decoded: bits a byte of the decoded tokens. raw: bits a byte of the original text, None where a part of the stream
    was scored or the shards do not know their text's bytes. nats: sum of -log p(target). tokens: targets. bytes: UTF-8
    bytes of the decoded targets.
    """

    decoded: float
    raw: float | None
    nats: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Window:
    """A piece of the stream: the model reads tokens start..stop - 1, and the targets first..stop count, where
    start < first <= stop."""

    start: int
    stop: int
    first: int


def chunked_bpb(
    model: CompactModel,
    shards: TokenShards,
    table: ByteCounter,
    length: int,
    isolated: bool,
    batch_size: int,
    limit_tokens: int | None = None,
) -> StreamScore:
    """Bits per byte in windows of `length` side by side, `batch_size` at a time.

    With isolated False these are the windows of the challenge's stock evaluation, which drops the last, shorter one;
    here it counts. limit_tokens = (len(shards) - 1) // length * length + 1 gives the stock figure.

    limit_tokens: score the first so many tokens of the stream only, >= 2; None for all.
    ValueError for sizes out of range, token ids beyond the model's vocabulary, no bytes, a loss that is not finite.
    """
    return sliding_bpb(model, shards, table, length, length, isolated, batch_size, limit_tokens)


def sliding_bpb(
    model: CompactModel,
    shards: TokenShards,
    table: ByteCounter,
    length: int,
    stride: int,
    isolated: bool,
    batch_size: int,
    limit_tokens: int | None = None,
) -> StreamScore:
    """Bits per byte in windows of `length` that start every `stride` tokens (1..length); see `sliding_windows`.

    Arguments and errors as for `chunked_bpb`, which is the case stride == length.
    """
    stream = read_stream(model, shards, limit_tokens)
    windows = sliding_windows(len(stream), length, stride)
    nats = window_nats(model, stream, windows, shards.bos_id if isolated else None, batch_size)
    return total_score(total_nats(model, nats), stream, shards, table)


def stateful_bpb(
    model: CompactModel,
    shards: TokenShards,
    table: ByteCounter,
    length: int,
    isolated: bool,
    batch_size: int,
    limit_tokens: int | None = None,
) -> StreamScore:
    """Bits per byte with the model's states carried through blocks of `length`.

    isolated True: each document is scored from its BOS to its end, and nothing depends on `length` or `batch_size` but
    time and memory; a batch holds documents of similar length, at most batch_size * length tokens or one document.
    isolated False: the stream is cut at document borders into at most `batch_size` parts of similar size that run side
    by side, each one flat document to the model; batch_size 1 carries one state through the whole stream.

    States hold what the mixers keep: a recurrence and a sliding window stay small, full attention grows with the
    longest document (or part) and is then as slow as one long forward. Positions run beyond those of training.
    Other arguments and errors as for `chunked_bpb`.
    """
    stream = read_stream(model, shards, limit_tokens)
    if length < 1 or batch_size < 1:
        raise ValueError(f"length is {length} and batch_size {batch_size}: both must be at least 1")
    if isolated:
        groups = list(_alike(_documents(stream, shards.bos_id), batch_size * length))
    else:
        parts = _parts(stream, shards.bos_id, batch_size)
        groups = [sorted(parts, key=lambda part: part[0] - part[1])]
    nats = math.fsum(total_nats(model, _carried_nats(model, stream, group, length)) for group in groups)
    return total_score(nats, stream, shards, table)


def sliding_windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows that start at 0, stride, 2 stride, ... The first counts all of its targets, another one those behind the
    end of the window before it: its last `stride`, fewer in the last window, which the end of the stream cuts.

    The challenge's scripts go on with windows whose targets have all been scored, and score the tail many times over.
    ValueError unless 1 <= stride <= length.
    """
    if length < 1 or not 1 <= stride <= length:
        raise ValueError(f"length is {length} and stride {stride}: needs 1 <= stride <= length")
    last = tokens - 1
    start, scored = 0, 0
    while scored < last:
        stop = min(start + length, last)
        yield Window(start, stop, scored + 1)
        start, scored = start + stride, stop


def read_stream(model: CompactModel, shards: TokenShards, limit_tokens: int | None) -> np.ndarray:
    """The first `limit_tokens` tokens (None for all), uint16 or uint32 [tokens].

    ValueError for a limit below 2, a stream that is shorter than 2, or ids beyond the model's vocabulary.
    """
    if limit_tokens is not None and limit_tokens < 2:
        raise ValueError(f"limit_tokens is {limit_tokens}; scoring needs at least 2 tokens, or null for all")
    stream = shards.tokens(0, len(shards) if limit_tokens is None else min(limit_tokens, len(shards)))
    if len(stream) < 2:
        raise ValueError(f"{shards.folder} holds {len(stream)} tokens; scoring needs at least 2")
    if int(stream.max()) >= model.vocabulary:
        raise ValueError(
            f"{shards.folder} holds token id {int(stream.max())}, and the model's vocabulary has {model.vocabulary} "
            "tokens; prepare the text with the tokenizer that the model was trained with"
        )
    return stream


def window_nats(
    model: CompactModel, stream: np.ndarray, windows: Iterable[Window], bos_id: int | None, batch_size: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Score windows, `batch_size` neighbours of one shape at a time, in eval mode and inference mode.

    bos_id: where positions restart inside a window (at its head they always do); None reads a window as one document.
    Yields the scored targets' places in the stream, int64 [N], and their -log p in nats, float32 (float64 for a float64
    model) [N] on the model's device, which may still be at work on them and has not been asked whether they are finite.
    """
    for batch in batches(windows, batch_size):
        tokens_BT, span = window_batch(stream, batch, bos_id, _device(model))
        skipped = batch[0].first - batch[0].start - 1
        places_BS = np.stack([np.arange(window.first, window.stop + 1) for window in batch])
        with evaluation_mode(model), torch.inference_mode():
            hidden_BTD, _ = model.hidden(tokens_BT[:, :-1], span)
            nats_N = _target_nats(model, hidden_BTD[:, skipped:], tokens_BT[:, skipped + 1 :])
        yield places_BS.reshape(-1), nats_N


def batches(windows: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Neighbouring windows of one length with equally many scored targets, at most `batch_size` (>= 1) at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for _, alike in groupby(
        windows, key=lambda window: (window.stop - window.start, window.first - window.start)
    ):
        while batch := list(islice(alike, batch_size)):
            yield batch


def window_batch(
    stream: np.ndarray, windows: list[Window], bos_id: int | None, device: torch.device
) -> tuple[Tensor, Span]:
    """Windows of one length as int64 tokens [B, T + 1] (inputs and the last target), and the span of the T inputs."""
    tokens_BT = np.stack([stream[window.start : window.stop + 1] for window in windows]).astype(np.int64)
    rows, length = tokens_BT.shape[0], tokens_BT.shape[1] - 1
    if bos_id is None:
        span = contiguous(rows, length, device=device)
    else:
        # On the host, where asking whether there is a border costs no wait for the device.
        place_T = np.arange(length)
        head_BT = np.maximum.accumulate(np.where(tokens_BT[:, :-1] == bos_id, place_T, 0), axis=1)
        positions_BT = place_T - head_BT
        span = Span(_send(positions_BT, device), borders=packed(torch.from_numpy(positions_BT)).borders)
    return _send(tokens_BT, device), span


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, to a GPU from page-locked memory, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def total_score(nats: float, stream: np.ndarray, shards: TokenShards, table: ByteCounter) -> StreamScore:
    """The score of a stream whose targets cost `nats` together. ValueError when they hold no byte of text."""
    count = 0
    for low in range(1, len(stream), COUNTED_TOKENS):
        high = min(low + COUNTED_TOKENS, len(stream))
        count += table.count(stream[low:high].astype(np.int64), stream[low - 1 : high - 1].astype(np.int64))
    if count < 1:
        raise ValueError(
            f"the first {len(stream)} tokens of {shards.folder} decode to no byte of text; score more"
        )
    bits = nats / math.log(2)
    whole = len(stream) == len(shards) and shards.text_bytes > 0
    return StreamScore(
        bits / count, bits / shards.text_bytes if whole else None, nats, len(stream) - 1, count
    )


def total_nats(model: CompactModel, scored: Iterable[tuple[np.ndarray, Tensor]]) -> float:
    """The sum over what `window_nats` yields, in float64. ValueError for a loss that is not finite."""
    scored = iter(scored)
    sums: list[float] = []
    while read := [nats_N for _, nats_N in islice(scored, READ_TOGETHER)]:
        sums += torch.stack([nats_N.double().sum() for nats_N in read]).tolist()
        if not math.isfinite(sum(sums)):
            wrong = sum(int((~nats_N.isfinite()).sum()) for nats_N in read)
            raise ValueError(
                f"{type(model).__name__} gives a loss that is not finite for {wrong} of "
                f"{sum(len(nats_N) for nats_N in read)} tokens; its weights are broken"
            )
    return math.fsum(sums)


def _target_nats(model: CompactModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in one dimension, from hidden [..., D] and targets [...], a bounded number of logits at a time."""
    hidden_ND, targets_N = hidden.flatten(0, -2), targets.flatten()
    rows = max(1, LOGIT_ELEMENTS // model.vocabulary)
    parts = []
    for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True):
        logits_CV = model.logits(hidden_CD)
        logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
        parts.append(cross_entropy(logits_CV, targets_C, reduction="none"))
    return torch.cat(parts)


def _documents(stream: np.ndarray, bos_id: int) -> list[tuple[int, int]]:
    """Inputs start..stop - 1 of every document; the last token of the stream is a target only."""
    starts = np.flatnonzero(stream[:-1] == bos_id).tolist()
    if not starts or starts[0] != 0:
        starts.insert(0, 0)
    return list(pairwise([*starts, len(stream) - 1]))


def _parts(stream: np.ndarray, bos_id: int, count: int) -> list[tuple[int, int]]:
    """At most `count` runs of whole documents, of similar size, as inputs start..stop - 1."""
    borders = np.array([start for start, _ in _documents(stream, bos_id)])
    wanted = np.arange(1, count) * (len(stream) - 1) / count
    after = np.searchsorted(borders, wanted)
    cuts = np.unique(borders[after[after < len(borders)]]).tolist()
    return list(pairwise([0, *(cut for cut in cuts if cut > 0), len(stream) - 1]))


def _alike(pieces: list[tuple[int, int]], tokens: int) -> Iterator[list[tuple[int, int]]]:
    """The pieces, longest first, in batches of at most `tokens` tokens once filled up, or of one piece."""
    waiting = sorted(pieces, key=lambda piece: piece[0] - piece[1])
    while waiting:
        rows = max(1, tokens // (waiting[0][1] - waiting[0][0]))
        yield waiting[:rows]
        waiting = waiting[rows:]


def _carried_nats(
    model: CompactModel, stream: np.ndarray, pieces: list[tuple[int, int]], length: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Score pieces, the longest first, each one document to the model, in blocks of `length` with the states carried
    between them; yields as `window_nats` does. A shorter piece is filled up with its last token, which is not scored.
    """
    device = _device(model)
    state = None
    starts_B1, stops_B1 = np.array(pieces).T[..., None]
    longest = pieces[0][1] - pieces[0][0]
    for begin in range(0, longest, length):
        block = min(length, longest - begin)
        places_BT = starts_B1 + np.arange(begin, begin + block)
        inputs_BT = _send(stream[np.minimum(places_BT, stops_B1 - 1)].astype(np.int64), device)
        targets_BT = _send(stream[np.minimum(places_BT + 1, stops_B1)].astype(np.int64), device)
        real_BT = places_BT < stops_B1
        kept_N = _send(np.flatnonzero(real_BT), device)
        with evaluation_mode(model), torch.inference_mode():
            span = contiguous(len(pieces), block, begin, device)
            hidden_BTD, state = model.hidden(inputs_BT, span, state)
            nats_N = _target_nats(model, hidden_BTD.flatten(0, 1)[kept_N], targets_BT.flatten()[kept_N])
        yield places_BT[real_BT] + 1, nats_N


def _device(model: CompactModel) -> torch.device:
    return next(model.parameters()).device
