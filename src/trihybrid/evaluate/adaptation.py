"""Score-first test-time training (the challenge's Track B): a model that learns from text that it was scored on.

The stream is cut into chunks. Every target of a chunk is scored, and only then a copy of the model takes a few steps
of SGD on the chunk; the next chunk is scored by what came out. So each target is scored once, by a model that no update
has shown it to, and the last chunk is not trained on. The result is no property of a fixed model and has its own label.

With K chunks, chunk i trains at learning_rate (1 + cos(pi i / (K - 1))) / 2.

Legend: B rows, T time, V vocabulary.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from trihybrid.data import TokenShards
from trihybrid.evaluate.scoring import evaluation_mode
from trihybrid.evaluate.section import AdaptationSection
from trihybrid.evaluate.stream import (
    ByteCounter,
    StreamScore,
    Window,
    batches,
    read_stream,
    sliding_windows,
    total_nats,
    total_score,
    window_batch,
    window_nats,
)
from trihybrid.models.compact import CompactModel

LABEL = "score-first test-time training"


@dataclass(frozen=True)
class AdaptedScore:
    """label: what kind of score this is, to be printed beside it. score: of the whole stream. chunk_nats: sum of -log p
    of the targets that were scored with each chunk. updates: steps of SGD."""

    label: str
    score: StreamScore
    chunk_nats: tuple[float, ...]
    updates: int


@dataclass(frozen=True)
class Chunk:
    """What is scored with a chunk, and what is trained on after that (nothing for the last chunk)."""

    scored: list[Window]
    trained: list[Window]


def adapted_bpb(
    model: CompactModel,
    shards: TokenShards,
    table: ByteCounter,
    section: AdaptationSection,
    length: int,
    isolated: bool,
    batch_size: int,
    limit_tokens: int | None = None,
) -> AdaptedScore:
    """Bits per byte with score-first test-time training on a copy of the model, which itself is unchanged.

    All parameters are trained, in windows of `length` side by side; the gradient of a step is that of the mean
    cross-entropy of its targets, BOS targets too. A learning rate of 0 gives the score of the fixed model.
    length, isolated, batch_size (of scoring), limit_tokens and errors as for `stream.chunked_bpb`; ValueError also for
    a stride beyond length and for a gradient that is not finite.
    """
    stream = read_stream(model, shards, limit_tokens)
    chunks = list(adaptation_chunks(len(stream), length, section.stride or length, section.chunk_tokens))
    bos_id = shards.bos_id if isolated else None
    student = deepcopy(model)
    for parameter in student.parameters():
        parameter.requires_grad_()
        parameter.grad = None
    optimizer = torch.optim.SGD(student.parameters(), lr=section.learning_rate, momentum=section.momentum)
    chunk_nats: list[float] = []
    updates = 0
    for number, chunk in enumerate(chunks):
        scored = window_nats(student, stream, chunk.scored, bos_id, batch_size)
        chunk_nats.append(total_nats(student, scored))
        cosine = (1 + math.cos(math.pi * number / max(len(chunks) - 1, 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = section.learning_rate * cosine
        updates += _train(student, optimizer, stream, chunk.trained, bos_id, section)
    score = total_score(math.fsum(chunk_nats), stream, shards, table)
    return AdaptedScore(LABEL, score, tuple(chunk_nats), updates)


def adaptation_chunks(tokens: int, length: int, stride: int, chunk_tokens: int) -> Iterator[Chunk]:
    """Cut a stream of `tokens` into chunks of `chunk_tokens` targets, the last one shorter.

    A window is scored with the chunk of its first scored target. What reaches over the chunk's end is then scored
    earlier than it need be, never later, so that no target is scored after it was trained on.
    """
    last = tokens - 1
    scored: list[list[Window]] = [[] for _ in range(-(-last // chunk_tokens))]
    for window in sliding_windows(tokens, length, stride):
        scored[(window.first - 1) // chunk_tokens].append(window)
    for number, windows in enumerate(scored):
        low, high = number * chunk_tokens, (number + 1) * chunk_tokens
        starts = range(low, high, length) if high < last else ()
        yield Chunk(windows, [Window(start, min(start + length, high), start + 1) for start in starts])


def _train(
    student: CompactModel,
    optimizer: torch.optim.Optimizer,
    stream: np.ndarray,
    windows: list[Window],
    bos_id: int | None,
    section: AdaptationSection,
) -> int:
    """Steps of SGD on the windows, in their order, epoch after epoch; returns how many."""
    updates = 0
    device = next(student.parameters()).device
    for _ in range(section.epochs):
        for batch in batches(windows, section.batch_size):
            tokens_BT, span = window_batch(stream, batch, bos_id, device)
            with evaluation_mode(student), torch.enable_grad():
                hidden_BTD, _ = student.hidden(tokens_BT[:, :-1], span)
                logits_BTV = student.logits(hidden_BTD)
                loss = cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
            norm = clip_grad_norm_(student.parameters(), section.clip)
            if not bool(norm.isfinite()):
                raise ValueError(
                    f"test-time training met a gradient norm of {float(norm)} at token {batch[0].start} of the stream; "
                    f"learning_rate is {section.learning_rate}: lower it"
                )
            optimizer.step()
            updates += 1
    return updates
