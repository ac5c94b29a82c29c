"""What the chunked losses refuse, and how weights become shares.

Shapes: N tokens, V vocabulary, A allowed vocabulary, D model width.
"""

import torch
from torch import Tensor


def check_hidden(hidden_name: str, hidden_ND: Tensor, head_name: str, head_VD: Tensor) -> None:
    """ValueError unless these are floating [N, D] and [V, D] of one width."""
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"{hidden_name} is {list(hidden_ND.shape)} and {head_name} {list(head_VD.shape)}; they must be [N, D] and "
            "[V, D] of one width D (flatten batch and time first)"
        )
    for name, tensor in ((hidden_name, hidden_ND), (head_name, head_VD)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be a floating dtype")


def check_sizes(chunk: int, block: int, top_k: int | None) -> None:
    """ValueError unless each of these is at least 1."""
    for name, value, meaning in (
        ("chunk", chunk, "token (1024 by default, less for less memory)"),
        ("block", block, "token of the vocabulary (16384 by default, less for less memory)"),
        ("top_k", top_k, "token, or None to compare all"),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1 {meaning}")


def checked_allowed(allowed_V: Tensor, head_VD: Tensor) -> Tensor:
    """The ids on the head's device; ValueError for ids outside of its rows, repeated ones or none."""
    vocabulary = head_VD.shape[0]
    if allowed_V.dtype != torch.int64 or allowed_V.dim() != 1 or len(allowed_V) == 0:
        raise ValueError(
            f"allowed_V is {allowed_V.dtype} {list(allowed_V.shape)}; it must be int64 [A] with at least one token id"
        )
    if int(allowed_V.min()) < 0 or int(allowed_V.max()) >= vocabulary:
        raise ValueError(
            f"allowed_V spans {int(allowed_V.min())} to {int(allowed_V.max())}; token ids lie in [0, {vocabulary})"
        )
    if len(allowed_V.unique()) != len(allowed_V):
        raise ValueError("allowed_V repeats a token id; each may be allowed once (use allowed_V.unique())")
    return allowed_V.to(head_VD.device)


def kept_weights(
    weight_N: Tensor | None, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    """Return the rows of non-zero weight (None for all rows) and their weights divided by the sum.

    ValueError for another shape, a negative or non-finite weight, or no weight at all.
    """
    if weight_N is None:
        # Without a look at the numbers, for which a GPU would have to be waited for.
        return None, torch.full((tokens,), 1 / tokens, dtype=dtype, device=device)
    if weight_N.shape != (tokens,):
        raise ValueError(
            f"weight_N has shape {list(weight_N.shape)}; it must be [{tokens}], one for each token"
        )
    weight_N = weight_N.detach().to(dtype)
    if not bool((weight_N.isfinite() & (weight_N >= 0)).all()):
        raise ValueError("weight_N holds a negative or non-finite number; weights are finite and at least 0")
    kept = weight_N.nonzero().squeeze(1)
    if len(kept) == 0:
        raise ValueError(
            f"no token has a weight: all {tokens} are masked; drop this batch or check its targets"
        )
    if len(kept) == tokens:
        return None, weight_N / weight_N.sum()
    return kept, weight_N[kept] / weight_N.sum()


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of these is, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
