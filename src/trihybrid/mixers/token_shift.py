"""The token-shift mixer: RWKV's channel mix at model width, which looks one token back and no further.

Equations: PR 1007 of openai/parameter-golf, whose "token mixing" is the channel mix of RWKV (arXiv 2305.13048,
equations 15 to 17).

    z_r = s(m_r) z + (1 - s(m_r)) z^-      z_k likewise with m_k          s the logistic function, z^-_t = z_{t-1}
    r = s(W_r z_r)     k = relu(W_k z_k)^2     y = r (W_v k)

With `back` = K > 1 the shifted input is a learned average, z^-_t = sum_j softmax(c)_j z_{t-j} over j = 1..K.

Legend: B batch, T time, D model width, K tokens back.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trihybrid.mixers.contract import Cost, Mixer, Projection, Shared, Write
from trihybrid.mixers.span import Span
from trihybrid.mixers.squared import squared
from trihybrid.mixers.state import ShiftState, State
from trihybrid.ops.token_shift import last_tokens, token_shift


@dataclass(frozen=True)
class TokenShiftOptions:
    """Width in channels, how many tokens back it looks (1 to 64), and whether its output has learned scales."""

    hidden_size: int
    back: int = 1
    output_scale: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.back <= 64:
            raise ValueError(f"token_shift.back is {self.back}; it must lie in 1 to 64 tokens")


class TokenShift(Mixer):
    """Receptance times value of the current token blended with the one before."""

    kind = "token_shift"

    def __init__(self, options: TokenShiftOptions) -> None:
        super().__init__()
        self.options = options
        width, back = options.hidden_size, options.back
        self.receptance = Projection(width, width)
        self.key = Projection(width, width)
        self.value = Projection(width, width, options.output_scale)
        self.mix_r = nn.Parameter(torch.empty(width))
        self.mix_k = nn.Parameter(torch.empty(width))
        if back > 1:
            self.taps_r = nn.Parameter(torch.empty(back, width))
            self.taps_k = nn.Parameter(torch.empty(back, width))

    def forward(
        self, x_BTD: Tensor, span: Span, state: State | None, shared: Shared
    ) -> tuple[Tensor, State | None]:
        assert state is None or isinstance(state, ShiftState)
        before_BKD = None if state is None else state.last_BKD
        back = self.options.back
        shifts = [
            token_shift(x_BTD, before_BKD, span.positions_BT, distance) for distance in range(1, back + 1)
        ]
        r_BTD = self._blend(x_BTD, shifts, self.mix_r, "taps_r")
        k_BTD = self._blend(x_BTD, shifts, self.mix_k, "taps_k")
        gate_BTD, value_BTD = self.gate_and_value(r_BTD, k_BTD)
        return torch.sigmoid(gate_BTD) * value_BTD, ShiftState(last_tokens(x_BTD, before_BKD, back))

    def gate_and_value(self, r_BTD: Tensor, k_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """W_r z_r and W_v k, both [B, T, D], for callers that blend and gate themselves."""
        return self.receptance(r_BTD), squared(k_BTD, self.key, self.value, slope=0.0)

    def _blend(self, x_BTD: Tensor, shifts: list[Tensor], mix_D: Tensor, taps: str) -> Tensor:
        share_D = torch.sigmoid(mix_D).to(x_BTD.dtype)
        shifted_BTD = shifts[0]
        if len(shifts) > 1:
            taps_KD = torch.softmax(getattr(self, taps), 0).to(x_BTD.dtype)
            shifted_BTD = sum(
                (tap_D * shift for tap_D, shift in zip(taps_KD, shifts, strict=True)), 0 * x_BTD
            )
        return torch.lerp(shifted_BTD, x_BTD, share_D)

    def initialise(self, index: int, count: int, write: Write) -> None:
        """Orthogonal receptance and key, a value projection of zero, mixes of 0.5 before the logistic function (0.62 of
        the current token); nearer tokens weigh more where there are several."""
        for projection in (self.receptance, self.key):
            write(projection.weight, nn.init.orthogonal_(torch.empty(projection.weight.shape)))
        write(self.value.weight, torch.zeros(self.value.weight.shape))
        for mix in (self.mix_r, self.mix_k):
            write(mix, torch.full(mix.shape, 0.5))
        if self.value.scale is not None:
            write(self.value.scale, torch.ones(self.value.scale.shape))
        if self.options.back > 1:
            for taps in (self.taps_r, self.taps_k):
                write(taps, -torch.arange(self.options.back, dtype=torch.float32)[:, None].expand(taps.shape))

    def new_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> ShiftState:
        shape = (batch, self.options.back, self.options.hidden_size)
        return ShiftState(torch.zeros(shape, device=device, dtype=dtype))

    def cost(self, context: int) -> Cost:
        weights = sum(p.numel() for p in self.parameters())
        products = 3 * self.options.hidden_size**2
        stored = 2 * self.options.back * self.options.hidden_size
        return Cost(2 * products, stored, 2 * weights + stored)
