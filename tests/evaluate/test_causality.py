"""A causal model passes with a move of 0; every kind of leak is named."""

import pytest
import torch
from torch import Tensor

from tiny_stream import VOCABULARY, RunningMean, compact
from trihybrid.evaluate.causality import check_causality

TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


class Bidirectional(RunningMean):
    """Looks `reach` tokens ahead, only over borders if `at_borders`."""

    def __init__(self, reach: int, at_borders: bool = False) -> None:
        super().__init__()
        self.reach, self.at_borders = reach, at_borders

    def hidden(self, tokens_BT, span, states=None):
        hidden_BTD, states = super().hidden(tokens_BT, span, states)
        ahead_BTD = torch.zeros_like(hidden_BTD)
        ahead_BTD[:, : -self.reach, :6] = self.embedding[tokens_BT[:, self.reach :]]
        if self.at_borders:
            border_BT = torch.zeros_like(span.positions_BT, dtype=torch.bool)
            border_BT[:, : -self.reach] = span.positions_BT[:, self.reach :] == 0
            ahead_BTD = ahead_BTD * border_BT[..., None]
        return hidden_BTD + ahead_BTD, states


def test_causal_model_does_not_move_at_all() -> None:
    model = RunningMean()
    model.train()
    assert check_causality(model, TOKENS) == 0.0
    assert model.training


@pytest.mark.parametrize("peek", [1.0, 1e-6])
def test_mean_over_all_tokens_is_refused(peek) -> None:
    with pytest.raises(
        ValueError, match=r"not causal: with one document a row, exchanging token 1 moves .* at position 0"
    ):
        check_causality(RunningMean(peek=peek), TOKENS)


LATER = "tokens 1 and later"


@pytest.mark.parametrize(("reach", "exchanged"), [(1, "token 1"), (2, LATER), (20, LATER)])
def test_looking_ahead_is_refused_and_placed(reach, exchanged) -> None:
    with pytest.raises(
        ValueError, match=f"one document a row, exchanging {exchanged} moves the logits at position 0 "
    ):
        check_causality(Bidirectional(reach), TOKENS)


def test_leak_over_a_border_alone_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"documents that begin at 0, 8, 16, exchanging token 8 moves .* position 7"
    ):
        check_causality(Bidirectional(1, at_borders=True), TOKENS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_part_of_a_compact_model_is_causal(dtype) -> None:
    move = check_causality(compact(dtype), TOKENS)
    assert move <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def test_leak_inside_a_compact_model_is_refused(monkeypatch) -> None:
    model = compact(torch.bfloat16)
    down = model.blocks[2].mlp.down
    forward = down.forward
    monkeypatch.setattr(down, "forward", lambda x_BTD: forward(x_BTD + x_BTD.mean(1, keepdim=True)))
    with pytest.raises(ValueError, match=r"CompactModel is not causal.*\(allowed: 2e-02\)"):
        check_causality(model, TOKENS)


def test_rounding_is_allowed_by_the_compute_dtype() -> None:
    class Rough(RunningMean):
        """float64 sums, and a move of 1e-6 with the last token."""

        dtype = torch.float32

        def hidden(self, tokens_BT, span, states=None):
            hidden_BTD, states = super().hidden(tokens_BT, span, states)
            return (hidden_BTD * (1 + 1e-6 * tokens_BT[:, -1:, None])).to(self.dtype), states

        def logits(self, hidden: Tensor) -> Tensor:
            return (hidden.double() @ self.head.T).to(torch.promote_types(hidden.dtype, torch.float32))

    model = Rough()
    assert 1e-7 < check_causality(model, TOKENS) < 1e-4
    model.dtype = torch.float64
    with pytest.raises(ValueError, match=r"allowed: 1e-10"):
        check_causality(model, TOKENS)


def test_refusals() -> None:
    for tokens in (TOKENS[0], TOKENS[:, :7], TOKENS[:0]):
        with pytest.raises(ValueError, match="T >= 8"):
            check_causality(RunningMean(), tokens)
    broken = RunningMean()
    broken.head.data[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        check_causality(broken, TOKENS)
