"""One layer of a compact model.

    u = m0 x + m1 x0            x0 the first rows of the stream, m0 = 1 and m1 = 0 at the start
    x = u + a Mix(c rms(u))     c = 1 / sqrt(layer + 1) or 1, a learned a channel
    x = x + b MLP(c rms(x))     MLP(z) = W_down act(W_up z), act the square of leaky ReLU or of ReLU

a and b scale the rows of the branches' output matrices, which is the same and costs nothing a token. Each sum is left
to whoever norms it next, so that sum, mix and norm are one pass over memory (`ops.mixed_norm`).

Legend: B batch, T time, D model width.
"""

import torch
from torch import Tensor, nn

from trihybrid.mixers.attention import Attention, AttentionOptions
from trihybrid.mixers.contract import Mixer, Projection, Shared, Write
from trihybrid.mixers.rwkv7 import Rwkv7, Rwkv7Options
from trihybrid.mixers.span import Span
from trihybrid.mixers.squared import squared
from trihybrid.mixers.state import ShiftState, State
from trihybrid.mixers.tica import Tica, TicaOptions
from trihybrid.mixers.token_shift import TokenShift, TokenShiftOptions
from trihybrid.models.compact.section import CompactSection
from trihybrid.models.pattern import Slot
from trihybrid.ops.mixed_norm import mixed_blend, mixed_norm, scaled_norm
from trihybrid.ops.token_shift import last_tokens

EPSILON = 1e-6


class Mlp(nn.Module):
    """The two matrices and the squared activation."""

    def __init__(self, hidden: int, inner: int, slope: float, scaled: bool) -> None:
        super().__init__()
        self.slope = slope
        self.up = Projection(hidden, inner)
        self.down = Projection(inner, hidden, scaled)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return squared(x_BTD, self.up, self.down, self.slope)


class Block(nn.Module):
    """A slot's mixers and an MLP around the residual stream."""

    def __init__(self, section: CompactSection, slot: Slot, index: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(build_mixer(section, slot, kind, index) for kind in slot.mixers)
        slope = {"leaky_relu2": 0.5, "relu2": 0.0}[section.activation]
        self.mlp = Mlp(section.hidden_size, section.inner_size, slope, section.branch_scales)
        attention = bool({"full", "sliding"} & set(slot.mixers))
        scaled = section.norm_scale == "all" or (section.norm_scale == "attention" and attention)
        self.norm_scale = (index + 1) ** -0.5 if scaled else 1.0
        self.embedding_mix = (
            nn.Parameter(torch.empty(2, section.hidden_size)) if section.embedding_mix else None
        )

    def forward(
        self,
        x_BTD: Tensor,
        branch_BTD: Tensor | None,
        first_BTD: Tensor,
        span: Span,
        states: list[State | None],
        shared: Shared,
    ) -> tuple[Tensor, Tensor, list[State | None]]:
        """Takes the stream as two summands, x + branch (None for zero), and gives it back as two: the stream after the
        mixers and the output of the MLP, not yet added. All are [B, T, D]; the states are one a mixer."""
        stream = (x_BTD, branch_BTD, first_BTD, self.embedding_mix)
        x_BTD, mixed_BTD, gate_BTD, after = self._mix(stream, span, states, shared)
        x_BTD, z_BTD = mixed_norm(x_BTD, mixed_BTD, None, None, self.norm_scale, EPSILON, gate_BTD)
        return x_BTD, self.mlp(z_BTD), after

    def _mix(
        self,
        stream: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        span: Span,
        states: list[State | None],
        shared: Shared,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[State | None]]:
        """The mixed stream with the outputs of all mixers but the last, the last one's output, a gate that its logistic
        function has yet to open (None for no gate), and the states."""
        only = self.mixers[0]
        # A block of tokens that nothing came before: one norm blends and the next one gates, so that neither the normed
        # rows nor the gated ones are written out.
        if (
            isinstance(only, TokenShift)
            and len(self.mixers) == 1
            and only.options.back == 1
            and states[0] is None
        ):
            shares = torch.sigmoid(only.mix_r), torch.sigmoid(only.mix_k)
            x_BTD, r_BTD, k_BTD = mixed_blend(*stream, span.positions_BT, *shares, self.norm_scale, EPSILON)
            last_B1D = scaled_norm(x_BTD[:, -1:], self.norm_scale, EPSILON)
            gate_BTD, value_BTD = only.gate_and_value(r_BTD, k_BTD)
            return x_BTD, value_BTD, gate_BTD, [ShiftState(last_tokens(last_B1D, None, 1))]
        x_BTD, z_BTD = mixed_norm(*stream, self.norm_scale, EPSILON)
        branch_BTD, after = None, []
        for mixer, state in zip(self.mixers, states, strict=True):
            if branch_BTD is not None:
                x_BTD = x_BTD + branch_BTD
            branch_BTD, state = mixer(z_BTD, span, state, shared)
            after.append(state)
        return x_BTD, branch_BTD, None, after

    def initialise(self, index: int, count: int, write: Write) -> None:
        """The mixers' own start, with every output matrix zero; an orthogonal `up`."""
        for mixer in self.mixers:
            assert isinstance(mixer, Mixer)
            mixer.initialise(index, count, write)
            if isinstance(mixer, Rwkv7):
                write(mixer.output.weight, torch.zeros(mixer.output.weight.shape))
        write(self.mlp.up.weight, nn.init.orthogonal_(torch.empty(self.mlp.up.weight.shape)))
        write(self.mlp.down.weight, torch.zeros(self.mlp.down.weight.shape))
        if self.mlp.down.scale is not None:
            write(self.mlp.down.scale, torch.ones(self.mlp.down.scale.shape))
        if self.embedding_mix is not None:
            start = torch.zeros(self.embedding_mix.shape)
            start[0] = 1.0
            write(self.embedding_mix, start)

    def roles(self) -> dict[str, str]:
        roles = {
            name: "matrix" if name.endswith("weight") else "vector" for name, _ in self.named_parameters()
        }
        for place, mixer in enumerate(self.mixers):
            assert isinstance(mixer, Mixer)
            roles |= {f"mixers.{place}.{name}": role for name, role in mixer.roles().items()}
        return roles


def build_mixer(section: CompactSection, slot: Slot, kind: str, index: int) -> Mixer:
    """The mixer of one kind in a slot."""
    hidden = section.hidden_size
    if kind == "token_shift":
        return TokenShift(TokenShiftOptions(hidden, slot.options.get("back", 1), section.branch_scales))
    if kind == "rwkv7":
        return Rwkv7(Rwkv7Options(hidden_size=hidden, **section.rwkv7.model_dump()), index)
    if kind == "tica":
        return Tica(TicaOptions(hidden_size=hidden, **section.tica.model_dump()), index)
    return Attention(
        AttentionOptions(
            hidden_size=hidden,
            heads=section.heads,
            kv_heads=section.kv_heads,
            head_dim=section.head_dim,
            window=slot.options.get("window") if kind == "sliding" else None,
            rope_dims=slot.options.get("rope_dims", section.rope_dims),
            rope_base=section.rope_base,
            rope_frequencies=section.rope_frequencies,
            query_gain=section.query_gain,
            xsa=slot.options.get("xsa", False),
            value_residual=slot.options.get("value_residual", section.value_residual)
            and index > section.first_attention,
            output_scale=section.branch_scales,
        ),
        index,
    )
