"""One pass of a model over batches: scores for each token, handed to as many meters as are asked for.

`score` is the only loop. A meter sums what it needs (`add`) and gives its measurement (`result`), so that bits per
byte, agreement and loss by position cost one forward together as they do alone.

Shapes: B batch, T time, V vocabulary, N tokens that count (target not -100), C tokens of one chunk.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from trihybrid.data import Batch
from trihybrid.ops.divergence import IGNORED_TARGET, Comparison, compare_distributions


@dataclass(frozen=True)
class Scores:
    """Scores of the N tokens of one chunk whose target counts.

    nats_N: float32 (float64 for a float64 model), -log p(target).
    positions_N: int64, restarting position of the token that predicts, from 0.
    comparison: the model as student against the teacher; None when there is no teacher.
    entropy_N, confidence_N: of the model's own distribution, in nats, and the probability of its first choice; dtype
        of nats_N.
    right_N: bool, whether the first choice is the target.
    """

    nats_N: Tensor
    positions_N: Tensor
    comparison: Comparison | None
    entropy_N: Tensor
    confidence_N: Tensor
    right_N: Tensor


class Meter(Protocol):
    """Something that sums scores. `result` is on each meter, with its own type."""

    def add(self, scores: Scores) -> None: ...


def score(
    model: nn.Module,
    batches: Iterable[Batch],
    meters: Sequence[Meter],
    teacher: nn.Module | None = None,
    chunk: int = 1024,
) -> None:
    """Run model (and teacher) over batches in eval mode and hand the scores to every meter.

    The models take input_ids and position_ids [B, T] and return `.logits` [B, T, V], softcapped by themselves; the
    positions restart at document borders, which isolates documents. Log-softmax in float32 (float64 if the logits
    are), chunk tokens at a time. Each module's training flag is restored.
    ValueError when logits have another shape, the vocabularies differ, a loss is not finite, or no target counts.
    """
    counted = 0
    with evaluation_mode(model, teacher):
        for batch in batches:
            # Entered here and not around the loop: what the caller's iterator makes stays usable by autograd.
            with torch.inference_mode():
                counted += _score_batch(model, teacher, batch, meters, chunk)
    if counted == 0:
        raise ValueError(
            "batches hold no target that counts; evaluation needs at least one token after a document's first"
        )


def _score_batch(
    model: nn.Module, teacher: nn.Module | None, batch: Batch, meters: Sequence[Meter], chunk: int
) -> int:
    targets_N = batch.targets.flatten()
    kept_N = (targets_N != IGNORED_TARGET).nonzero().squeeze(1)
    if len(kept_N) == 0:
        return 0
    logits_NV = next_token_logits(model, batch.inputs, batch.positions).flatten(0, 1)
    teacher_NV = None
    if teacher is not None:
        teacher_NV = next_token_logits(teacher, batch.inputs, batch.positions).flatten(0, 1)
        if teacher_NV.shape != logits_NV.shape:
            raise ValueError(
                f"the student's vocabulary has {logits_NV.shape[1]} tokens and the teacher's {teacher_NV.shape[1]}; "
                "they must share one tokenizer"
            )
    positions_N = batch.positions.flatten()
    for rows_C in kept_N.split(chunk):
        log_student_CV = _log_probabilities(logits_NV, rows_C)
        targets_C = targets_N[rows_C].to(logits_NV.device)
        nats_C = -log_student_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
        if not bool(nats_C.isfinite().all()):
            raise ValueError(
                f"{type(model).__name__} gives a loss that is not finite for {int((~nats_C.isfinite()).sum())} tokens; "
                "its weights are broken or a needed token is masked out"
            )
        comparison = None
        if teacher_NV is not None:
            log_teacher_CV = _log_probabilities(teacher_NV, rows_C).to(log_student_CV)
            comparison = compare_distributions(log_teacher_CV, log_student_CV)
        log_top_C, choice_C = log_student_CV.max(dim=-1)
        entropy_C = -(log_student_CV.exp() * log_student_CV).sum(dim=-1)
        scores = Scores(
            nats_C, positions_N[rows_C], comparison, entropy_C, log_top_C.exp(), choice_C == targets_C
        )
        for meter in meters:
            meter.add(scores)
    return len(kept_N)


def next_token_logits(model: nn.Module, inputs_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Return the model's logits [B, T, V], on its own device and in its own dtype, without a cache."""
    device = _device(model)
    logits_BTV = model(
        input_ids=inputs_BT.to(device), position_ids=positions_BT.to(device), use_cache=False
    ).logits
    if logits_BTV.dim() != 3 or logits_BTV.shape[:2] != inputs_BT.shape:
        raise ValueError(
            f"{type(model).__name__} returned logits {list(logits_BTV.shape)} for input_ids {list(inputs_BT.shape)}; "
            "a causal language model returns [B, T, V]"
        )
    return logits_BTV


@contextmanager
def evaluation_mode(*models: nn.Module | None) -> Iterator[None]:
    """Put the models in eval mode; afterwards every submodule has its own training flag back."""
    training = [
        (module, module.training) for model in models if model is not None for module in model.modules()
    ]
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag


def _log_probabilities(logits_NV: Tensor, rows_C: Tensor) -> Tensor:
    logits_CV = logits_NV[rows_C.to(logits_NV.device)]
    if logits_CV.dtype != torch.float64:
        logits_CV = logits_CV.float()
    return torch.log_softmax(logits_CV, dim=-1)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
