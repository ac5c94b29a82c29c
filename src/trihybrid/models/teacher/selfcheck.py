"""What a teacher must do before anything is made from it: checks of a few tokens, when it is loaded.

Releases of transformers have computed a Gemma-4 wrongly without a cache (5.5.0 and 5.5.1: keys and values that layers
share), lose gradients under reentrant checkpointing, and let `.to(bfloat16)` round the rotary frequencies. None of that
raises by itself.

Legend: B batch, T tokens, V vocabulary, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from trihybrid.models.cache import CACHE

TOKENS = 8
LIMITS = {torch.bfloat16: 0.5, torch.float16: 0.5}
"""Relative rms difference that is allowed; 1e-3 for wider dtypes. What is looked for is of the size of the result; the
rounding of tiny random models, which is the worst, came to 6e-6 in float32, and in bfloat16 to 0.09, or 0.28 where it
sends tokens to other experts."""


def check_rotary(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose rotary frequencies were rounded.

    Args:
        model: any.
        name: what it is called.

    Raises:
        ValueError: a buffer of frequencies that is narrower than float32.
    """
    for buffer, tensor in model.named_buffers():
        if buffer.endswith("inv_freq") and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: {buffer} is {tensor.dtype}, must be float32: far positions would be turned by wrong angles; "
                "load the model in its dtype instead of casting it"
            )


def check_teacher(teacher: PreTrainedModel, name: str) -> None:
    """Compare a teacher with itself on `TOKENS` tokens: logits with and without a cache, and the gradient of the first
    layer's norm with and without checkpointing.

    Args:
        teacher: just loaded: in eval mode, without checkpointing, as it is again afterwards.
        name: what it is called.

    Raises:
        ValueError: they differ.
    """
    # Padding has an embedding of zero, at which the norms' gradient is no number.
    words = [token for token in range(teacher.config.vocab_size) if token != teacher.config.pad_token_id]
    ids_1T = torch.tensor([words[:TOKENS]], device=teacher.device)
    with torch.no_grad():
        whole = teacher(ids_1T, use_cache=False).logits
        half = ids_1T.shape[1] // 2
        first = teacher(ids_1T[:, :half], use_cache=True)
        rest = teacher(ids_1T[:, half:], use_cache=True, **{CACHE: first[CACHE]})
    _compare(name, "logits with and without a cache", torch.cat([first.logits, rest.logits], 1), whole)
    with _training(teacher) as gradient:
        plain_D = gradient(ids_1T)
        _switch(teacher, True)
        _compare(name, "gradients with and without checkpointing", gradient(ids_1T), plain_D)


def _compare(name: str, what: str, found: Tensor, wanted: Tensor) -> None:
    limit = LIMITS.get(wanted.dtype, 1e-3)
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
    if not error <= limit:
        raise ValueError(
            f"{name}: {what} differ by {error:.1e} (relative rms, at most {limit:g}): transformers "
            f"{transformers.__version__} does not compute this model rightly; install another release of it"
        )


@contextmanager
def _training(teacher: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """The gradient [D] of a loss by the weight of the first layer's norm, in training mode."""
    weight_D = teacher.model.layers[0].input_layernorm.weight
    trained = weight_D.requires_grad
    teacher.train()
    weight_D.requires_grad_(True)

    def gradient(ids_1T: Tensor) -> Tensor:
        with torch.enable_grad():
            logits_1TV = teacher(ids_1T, use_cache=False).logits
            return torch.autograd.grad(logits_1TV.float().square().mean(), weight_D)[0]

    try:
        yield gradient
    finally:
        weight_D.requires_grad_(trained)
        teacher.eval()
        _switch(teacher, False)


def _switch(teacher: PreTrainedModel, on: bool) -> None:
    """Checkpointing on or off, by the name that this release of transformers does not call deprecated."""
    word = "enable" if on else "disable"
    new = getattr(teacher, f"activation_checkpointing_{word}", None)
    (new or getattr(teacher, f"gradient_checkpointing_{word}"))()
