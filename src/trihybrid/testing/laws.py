"""The laws of a mixer. Each takes a `Subject` and a dtype, and raises `LawBroken` when the mixer does not obey.

"Equal" is `relative_error` within `TOLERANCE`; "to the bit" is torch.equal. Legend: B batch, T time, D model width.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trihybrid.mixers.contract import ROLES, Shared
from trihybrid.mixers.span import Span, packed, padded
from trihybrid.mixers.state import state_bytes
from trihybrid.testing.trial import BATCH, LENGTH, Subject, Trial, one_row, through_bytes

ROW_LENGTHS = ((6, 1, 9, 5), (3, 12, 5, 1))
"""Lengths of the packed documents of each row; each row adds up to `LENGTH`."""


@dataclass(frozen=True)
class Law:
    """A law with the dtypes that it is meant for; `needs_reference` ones apply where a subject has a reference."""

    check: Callable[[Subject, torch.dtype], None]
    dtypes: tuple[torch.dtype, ...]
    needs_reference: bool = False

    def applies(self, subject: Subject) -> bool:
        """Whether the subject can be tried."""
        return not self.needs_reference or subject.reference is not None


def causal(subject: Subject, dtype: torch.dtype) -> None:
    """Another token at t moves no output before t, and none of those has a gradient to the tokens from t on.

    The output at t + 1 must move: a mixer that ignores the past, or whose output is zero, would obey all other laws.
    """
    trial = Trial("causal", subject, dtype)
    x_BTD = trial.x_BTD
    with torch.no_grad():
        before, _ = trial.run(x_BTD, trial.span(LENGTH))
    for t in (1, LENGTH // 2, LENGTH - 2):
        other_BTD = x_BTD.clone()
        other_BTD[:, t] = x_BTD[:, t].flip(-1) + 1
        with torch.no_grad():
            after, _ = trial.run(other_BTD, trial.span(LENGTH))
        trial.same(f"output before token {t}", after[:, :t], before[:, :t])
        trial.require(
            not torch.equal(after[:, t + 1], before[:, t + 1]), f"token {t + 1} does not see token {t}"
        )
        leaf_BTD = x_BTD.clone().requires_grad_()
        early, _ = trial.run(leaf_BTD, trial.span(LENGTH))
        (gradient,) = torch.autograd.grad(early[:, :t].square().sum(), leaf_BTD)
        allowed = torch.cat([gradient[:, :t], torch.zeros_like(gradient[:, t:])], 1)
        trial.same_gradients({"later tokens": gradient}, {"later tokens": allowed})


def chunked_equals_whole(subject: Subject, dtype: torch.dtype) -> None:
    """Blocks with the state carried between them give the outputs, the final state and the gradients of one block."""
    _same_in_blocks("chunked_equals_whole", subject, dtype, [8, 1, 7, 3, 2])


def token_by_token_equals_whole(subject: Subject, dtype: torch.dtype) -> None:
    """One token a block gives the outputs, the final state and the gradients of one block."""
    _same_in_blocks("token_by_token_equals_whole", subject, dtype, [1] * LENGTH)


def save_restore(subject: Subject, dtype: torch.dtype) -> None:
    """A state that goes through safetensors continues to the bit like the one that stayed."""
    trial = Trial("save_restore", subject, dtype)
    x_BTD = trial.x_BTD
    half = LENGTH // 2
    with torch.no_grad():
        _, states = trial.run(x_BTD[:, :half], trial.span(half))
        restored = [through_bytes(state) for state in states]
        rest = trial.span(LENGTH - half, half)
        ahead, after = trial.run(x_BTD[:, half:], rest, deepcopy(states))
        again, after_again = trial.run(x_BTD[:, half:], rest, restored)
    trial.bits("output after restoring", again, ahead)
    trial.same_states(after_again, after, bits=True)


def left_padding_changes_nothing(subject: Subject, dtype: torch.dtype) -> None:
    """Padding before the text, with anything in it, changes neither outputs nor gradients, nor the state of a
    recurrence, nor the tokens that are decoded after it."""
    trial = Trial("left_padding_changes_nothing", subject, dtype)
    x_BTD = trial.x_BTD
    pads, block = (5, 0), LENGTH - 3
    mask_BS = torch.ones(BATCH, LENGTH, dtype=torch.bool, device=subject.device)
    garbage_BTD = 10 * x_BTD.flip(1) + 1
    mixed_BTD = x_BTD.clone()
    for row, pad in enumerate(pads):
        mask_BS[row, :pad] = False
        mixed_BTD[row, :pad] = garbage_BTD[row, :pad]
    leaf_BTD = mixed_BTD.requires_grad_()
    y, states = trial.run(leaf_BTD[:, :block], padded(mask_BS[:, :block], block))
    outputs = [y]
    for t in range(block, LENGTH):
        y, states = trial.run(leaf_BTD[:, t : t + 1], padded(mask_BS[:, : t + 1], 1, t), states)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    gradients = trial.gradients(leaf_BTD, torch.where(mask_BS[..., None], y, torch.zeros_like(y)))
    totals: dict[str, Tensor] = {}
    for row, pad in enumerate(pads):
        alone_BTD = x_BTD[row : row + 1, pad:].clone().requires_grad_()
        expected, expected_states = trial.run(alone_BTD, trial.span(LENGTH - pad, batch=1))
        trial.same("output of real tokens", y[row : row + 1, pad:], expected)
        if subject.document_state:
            trial.same_states([one_row(state, row) for state in states], expected_states)
        part = trial.gradients(alone_BTD, expected)
        own = {"real tokens": gradients["input"][row : row + 1, pad:]}
        trial.same_gradients(own, {"real tokens": part.pop("input")})
        totals = {name: totals[name] + g if totals else g for name, g in part.items()}
    trial.same_gradients(gradients, totals)


def document_border_resets(subject: Subject, dtype: torch.dtype) -> None:
    """Documents packed into one row give outputs, gradients and (a recurrence) final state of each alone, also when the
    row comes in blocks that begin at a border, inside a document, and token by token."""
    trial = Trial("document_border_resets", subject, dtype)
    x_BTD = trial.x_BTD
    positions_BT = _packed_positions(subject.device)
    leaf_BTD = x_BTD.clone().requires_grad_()
    y, states = trial.run(leaf_BTD, packed(positions_BT))
    gradients = trial.gradients(leaf_BTD, y)
    totals: dict[str, Tensor] = {}
    for row, lengths in enumerate(ROW_LENGTHS):
        start, separate = 0, []
        for length in lengths:
            inside = (slice(row, row + 1), slice(start, start + length))
            alone_BTD = x_BTD[inside].clone().requires_grad_()
            expected, expected_states = trial.run(alone_BTD, trial.span(length, batch=1))
            separate.append(expected)
            part = trial.gradients(alone_BTD, expected)
            trial.same_gradients(
                {"its tokens": gradients["input"][inside]}, {"its tokens": part.pop("input")}
            )
            totals = {name: totals[name] + g if totals else g for name, g in part.items()}
            start += length
        # The row as a whole: nothing of a document of one token may be left but rounding, as where a mixer takes the
        # token's own value out, and that has no relative error.
        trial.same(f"output of the documents of row {row}", y[row : row + 1], torch.cat(separate, 1))
        if subject.document_state:
            trial.same_states([one_row(state, row) for state in states], expected_states)
    trial.same_gradients(gradients, totals)
    for sizes in ([6, 1, 9, 5], [8, 9, 4], [1] * LENGTH):
        with torch.no_grad():
            in_blocks, after = trial.run_blocks(x_BTD, sizes, lambda a, b: packed(positions_BT[:, a:b], a))
        trial.same(f"output in blocks of {sizes[0]}, {sizes[1]} ..", in_blocks, y)
        trial.same_states(after, states)


def fast_equals_reference(subject: Subject, dtype: torch.dtype) -> None:
    """Outputs, states and the gradients of the input and of every parameter equal those of the reference, which runs in
    float64 on the same rounded parameters and inputs; from an empty state, over borders, and from a carried state."""
    if subject.reference is None:
        raise ValueError(f"fast_equals_reference: subject {subject.name} has no reference to compare with")
    trial = Trial("fast_equals_reference", subject, dtype)
    wide = Trial("fast_equals_reference", subject, torch.float64, subject.reference)
    for reference, mixer in zip(wide.mixers, trial.mixers, strict=True):
        reference.load_state_dict(mixer.state_dict())
    positions_BT = _packed_positions(subject.device)
    half = LENGTH // 2
    cases: list[tuple[list[int], Callable[[int, int], Span]]] = [
        ([LENGTH], lambda a, b: packed(positions_BT)),
        ([half, LENGTH - half], lambda a, b: trial.span(b - a, a)),
    ]
    for sizes, span in cases:
        results = []
        for side in (trial, wide):
            leaf_BTD = trial.x_BTD.to(side.x_BTD.dtype, copy=True).requires_grad_()
            y, states = side.run_blocks(leaf_BTD, sizes, span)
            results.append((y, states, side.gradients(leaf_BTD, y, states)))
        (y, states, gradients), (expected, expected_states, expected_gradients) = results
        trial.same("output", y, expected)
        trial.same_states(states, expected_states)
        trial.same_gradients(gradients, expected_gradients)


def cost_exact(subject: Subject, dtype: torch.dtype) -> None:
    """`cost(context)` names the matrix-product FLOPs that torch counts while one token is decoded by the reference, and
    the bytes of the state that then holds `context` tokens. Keys and values take 2 bytes, so the dtype is bfloat16."""
    if torch.empty((), dtype=dtype).element_size() != 2:
        raise ValueError(
            f"cost_exact runs in a dtype of 2 bytes, in which cost() counts keys and values; got {dtype}"
        )
    trial = Trial("cost_exact", subject, dtype, subject.reference)
    mixer, x_BTD = subject.build(dtype, 0), trial.x_BTD[:1]
    for context in (1, 2, 7, LENGTH):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            states = [part.new_state(1, subject.device, dtype) for part in trial.mixers]
            if context > 1:
                _, states = trial.run(x_BTD[:, : context - 1], trial.span(context - 1, batch=1), states)
            shared, span, after = Shared(), trial.span(1, context - 1, batch=1), None
            for part, state in zip(trial.mixers, states, strict=True):
                with FlopCounterMode(display=False) as counter:
                    _, after = part(x_BTD[:, context - 1 : context], span, state, shared)
        cost = mixer.cost(context)
        trial.require(
            cost.flops == counter.get_total_flops(),
            f"cost({context}).flops is {cost.flops}, {counter.get_total_flops()} are counted",
        )
        trial.require(
            cost.state_bytes == state_bytes(after),
            f"cost({context}).state_bytes is {cost.state_bytes}, the state has {state_bytes(after)}",
        )


def roles_cover_parameters(subject: Subject, dtype: torch.dtype) -> None:
    """`roles()` names every parameter, nothing else, and only roles that exist."""
    mixer = subject.build(dtype, 0)
    trial = Trial("roles_cover_parameters", subject, dtype)
    roles, names = mixer.roles(), {name for name, _ in mixer.named_parameters()}
    trial.require(set(roles) == names, f"roles and parameters differ by {sorted(set(roles) ^ names)}")
    unknown = sorted(set(roles.values()) - set(ROLES))
    trial.require(not unknown, f"unknown roles {unknown}; choose from {list(ROLES)}")


def gradient_checkpointing_exact(subject: Subject, dtype: torch.dtype) -> None:
    """Gradients to the bit with and without recomputing the mixer in the backward (non-reentrant checkpointing)."""
    trial = Trial("gradient_checkpointing_exact", subject, dtype)
    x_BTD = trial.x_BTD
    results = []
    for recompute in (False, True):
        leaf_BTD = x_BTD.clone().requires_grad_()
        y, states = trial.run(leaf_BTD, trial.span(LENGTH), recompute=recompute)
        results.append(trial.gradients(leaf_BTD, y, states))
    for name, gradient in results[1].items():
        trial.bits(f"gradient of {name}", gradient, results[0][name])


def _same_in_blocks(law: str, subject: Subject, dtype: torch.dtype, sizes: list[int]) -> None:
    trial = Trial(law, subject, dtype)
    whole_BTD, parts_BTD = trial.x_BTD.clone().requires_grad_(), trial.x_BTD.clone().requires_grad_()
    expected, expected_states = trial.run(whole_BTD, trial.span(LENGTH))
    y, states = trial.run_blocks(parts_BTD, sizes, lambda a, b: trial.span(b - a, a))
    trial.same("output", y, expected)
    trial.same_states(states, expected_states)
    expected_gradients = trial.gradients(whole_BTD, expected, expected_states)
    trial.same_gradients(trial.gradients(parts_BTD, y, states), expected_gradients)


def _packed_positions(device: str) -> Tensor:
    rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in ROW_LENGTHS]
    return torch.stack(rows).to(device)


_WIDE = (torch.float64, torch.float32)
_ALL = (torch.float64, torch.float32, torch.bfloat16)

LAWS = {
    "causal": Law(causal, _ALL),
    "chunked_equals_whole": Law(chunked_equals_whole, _ALL),
    "token_by_token_equals_whole": Law(token_by_token_equals_whole, _ALL),
    "save_restore": Law(save_restore, _ALL),
    "left_padding_changes_nothing": Law(left_padding_changes_nothing, _ALL),
    "document_border_resets": Law(document_border_resets, _ALL),
    "fast_equals_reference": Law(fast_equals_reference, _ALL, needs_reference=True),
    "cost_exact": Law(cost_exact, (torch.bfloat16,)),
    "roles_cover_parameters": Law(roles_cover_parameters, (torch.float32,)),
    "gradient_checkpointing_exact": Law(gradient_checkpointing_exact, _WIDE),
}
"""Every law by name, with the dtypes that it is meant for."""
