"""Every mixer obeys every law, and every law can fail: a mixer that breaks it is refused."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from transformers import Gemma4TextConfig

from trihybrid.mixers.attention import Attention, AttentionOptions
from trihybrid.mixers.contract import Cost, Mixer
from trihybrid.mixers.front import Front, FrontOptions
from trihybrid.mixers.rwkv7 import REVISIONS, Rwkv7, Rwkv7Options
from trihybrid.mixers.state import RecurrentState
from trihybrid.mixers.tica import Tica, TicaOptions
from trihybrid.mixers.token_shift import TokenShift, TokenShiftOptions
from trihybrid.models.gemma4.retained import RetainedAttention
from trihybrid.testing import LAWS, LawBroken, Subject, randomise

WIDTH = 24
TEACHER = Gemma4TextConfig(
    hidden_size=WIDTH,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=16,
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    max_position_embeddings=128,
)
RWKV7 = Rwkv7Options(WIDTH, heads=4, kv_heads=2, head_dim=8, decay_rank=5, iclr_rank=6, gate_rank=7)
BIASED = replace(RWKV7, input_bias=True, output_bias=True)
RANKS = {"value_residual_rank": 4, "key_residual_rank": 3, "value_lora_rank": 5}
TICA = TicaOptions(WIDTH, heads=4, kv_heads=2, head_dim=8, gate_rank=5)


def retained(index: int, implementation: str = "sdpa"):
    def build(dtype: torch.dtype, seed: int) -> Mixer:
        base = Gemma4TextConfig.from_dict(TEACHER.to_dict())
        base._attn_implementation = implementation
        return randomise(RetainedAttention(base, index), seed).to(dtype)

    return build


def rwkv7(backend: str, index: int = 1, donor: int | None = None, options: Rwkv7Options = RWKV7):
    return lambda dtype, seed: randomise(Rwkv7(options, index, donor, backend), seed).to(dtype)


def revision(name: str, backend: str, index: int, **changes):
    """A slot of a published revision; slot 1 is the first one."""
    fixed = REVISIONS[name]
    fields = fixed.fields(None if fixed.rope == "never" else 50.0, RANKS) | changes
    options = replace(RWKV7, **fields)
    first = None if index == 1 else 1
    return lambda dtype, seed: randomise(Rwkv7(options, index, None, backend, first), seed).to(dtype)


def tica(index: int = 1, donor: int | None = None):
    return lambda dtype, seed: randomise(Tica(TICA, index, donor), seed).to(dtype)


class ValuesEmbedded(Attention):
    """An attention in a model that adds something of the token to its values."""

    def forward(self, x_BTD, span, state, shared):
        groups = (self.options.kv_heads, self.options.head_dim)
        shared.value_embeddings[self.index] = x_BTD[..., : groups[0] * groups[1]].tanh().unflatten(-1, groups)
        return super().forward(x_BTD, span, state, shared)


class FrontEnd(Mixer):
    """The embedding front end, its tokens read off the input, beside that input: no gradient goes through a token."""

    kind = "front"

    def __init__(self) -> None:
        super().__init__()
        self.front = Front(FrontOptions(WIDTH, 11, bigram_buckets=64, bigram_width=6))

    def forward(self, x_BTD, span, state, shared):
        tokens_BT = (x_BTD[..., 0].double() * 4).round().long() % 11
        rows_BTD, after = self.front(tokens_BT, span, state, x_BTD.dtype)
        return x_BTD + rows_BTD, after

    def roles(self):
        return {f"front.{name}": role for name, role in self.front.roles().items()}

    def new_state(self, batch, device, dtype):
        return self.front.new_state(batch, device, dtype)

    def cost(self, context):
        return self.front.cost()


def attention(index: int = 1, **options):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "rope_dims": 4, "output_scale": True, **options}
    return lambda dtype, seed: randomise(ValuesEmbedded(AttentionOptions(WIDTH, **sizes), index), seed).to(
        dtype
    )


def token_shift(back: int, scale: bool):
    return lambda dtype, seed: randomise(TokenShift(TokenShiftOptions(WIDTH, back, scale)), seed).to(dtype)


def front(dtype: torch.dtype, seed: int) -> Mixer:
    return randomise(FrontEnd(), seed).to(dtype)


SUBJECTS = [
    Subject("full", retained(1), WIDTH, float32_inside=True),
    Subject("sliding", retained(0), WIDTH, float32_inside=True),
    Subject("full shared", retained(3), WIDTH, donor=retained(1), float32_inside=True),
    Subject("sliding shared", retained(2), WIDTH, donor=retained(0), float32_inside=True),
    Subject("rwkv7 reference", rwkv7("reference"), WIDTH, document_state=True),
    Subject("rwkv7 chunked", rwkv7("chunked"), WIDTH, reference=rwkv7("reference"), document_state=True),
    Subject("rwkv7 biased", rwkv7("chunked", options=BIASED), WIDTH, document_state=True),
    Subject(
        "rwkv7 shared",
        rwkv7("chunked", 2, 1),
        WIDTH,
        donor=rwkv7("chunked"),
        reference=rwkv7("reference", 2, 1),
        document_state=True,
    ),
    *(
        Subject(
            name,
            revision(name, "chunked", 2),
            WIDTH,
            donor=revision(name, "chunked", 1),
            reference=revision(name, "reference", 2),
            document_state=True,
        )
        for name in REVISIONS
    ),
    Subject(
        "rwkv7 with biases, without norms",
        revision("hxa07d", "chunked", 2, input_bias=True, output_bias=True, qk_norm=False),
        WIDTH,
        donor=revision("hxa07d", "chunked", 1, qk_norm=False),
        reference=revision("hxa07d", "reference", 2, input_bias=True, output_bias=True, qk_norm=False),
        document_state=True,
    ),
    Subject("tica", tica(), WIDTH),
    Subject("tica shared", tica(2, 1), WIDTH, donor=tica()),
    Subject("own full", attention(rope_frequencies="head"), WIDTH),
    Subject("own sliding xsa", attention(window=5, xsa=True, rope_dims=8), WIDTH),
    Subject(
        "own residual xsa", attention(2, xsa=True, value_residual=True), WIDTH, donor=attention(window=3)
    ),
    Subject("token_shift", token_shift(1, True), WIDTH),
    Subject("token_shift back 3", token_shift(3, False), WIDTH),
    Subject("front", front, WIDTH),
]
CASES = [
    pytest.param(law, subject, dtype, id=f"{name}-{subject.name}-{str(dtype).removeprefix('torch.')}")
    for name, law in LAWS.items()
    for subject in SUBJECTS
    if law.applies(subject)
    for dtype in law.dtypes
    # What the later revisions have of their own shows in float64; rounding is that of the first and of hxa07i.
    if dtype == torch.float64 or subject.name not in REVISIONS.keys() - {"hxa079", "hxa07i"}
]


@pytest.mark.parametrize(("law", "subject", "dtype"), CASES)
def test_mixer_obeys_law(law, subject, dtype):
    law.check(subject, dtype)


class Leaky(Mixer):
    """An honest mixer to break: h_t = h_{t-1} exp(rate) + x_t, y = W (h mean-free over D), state h as [B, 1, D, 1]."""

    kind = "leaky"

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(WIDTH))
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BTD, span, state, shared):
        h_BD = x_BTD.new_zeros(x_BTD.shape[0], WIDTH) if state is None else state.matrix_BHKV[:, 0, :, 0]
        h_BD = h_BD.to(torch.float64 if x_BTD.dtype == torch.float64 else torch.float32)
        outputs = []
        for t in range(span.length):
            kept_BD = h_BD * (
                torch.tanh(self.rate) if span.reset_BT is None else self.fade(span.reset_BT[:, t, None])
            )
            new_BD = kept_BD + x_BTD[:, t]
            h_BD = (
                new_BD
                if span.valid_BT is None
                else torch.where(self.real(span.valid_BT[:, t, None]), new_BD, h_BD)
            )
            outputs.append(h_BD)
        y_BTD = self.read(torch.stack(outputs, 1)).to(x_BTD.dtype)
        return self.output(y_BTD), RecurrentState(h_BD[:, None, :, None])

    def fade(self, reset_B1):
        return torch.tanh(self.rate) * ~reset_B1

    def real(self, valid_B1):
        return valid_B1

    def read(self, h_BTD):
        return h_BTD

    def roles(self):
        return {"rate": "decay", "output.weight": "matrix"}

    def new_state(self, batch, device, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return RecurrentState(torch.zeros(batch, 1, WIDTH, 1, device=device, dtype=wide))

    def cost(self, context):
        return Cost(2 * WIDTH**2, 4 * WIDTH, 2 * (WIDTH**2 + WIDTH) + 4 * WIDTH)


class ReadsTheFuture(Leaky):
    def read(self, h_BTD):
        return h_BTD + 0.1 * h_BTD.roll(-1, 1)


class FutureGradient(Leaky):
    def read(self, h_BTD):
        later_BTD = h_BTD.roll(-1, 1)
        return h_BTD + later_BTD - later_BTD.detach()


class IgnoresThePast(Leaky):
    def forward(self, x_BTD, span, state, shared):
        return self.output(x_BTD), self.new_state(x_BTD.shape[0], x_BTD.device, x_BTD.dtype)


class ForgetsItsState(Leaky):
    def forward(self, x_BTD, span, state, shared):
        return super().forward(x_BTD, span, None, shared)


class DetachesItsState(Leaky):
    def forward(self, x_BTD, span, state, shared):
        y_BTD, after = super().forward(x_BTD, span, state, shared)
        return y_BTD, RecurrentState(after.matrix_BHKV.detach())


class HidesSomeState(Leaky):
    """Adds the last token of the block before, which it keeps outside of the tensors that are saved."""

    def forward(self, x_BTD, span, state, shared):
        y_BTD, after = super().forward(x_BTD, span, state, shared)
        return y_BTD + getattr(state, "hidden", 0.0), HiddenState(after.matrix_BHKV, float(x_BTD[0, -1, 0]))


@dataclass(frozen=True)
class HiddenState(RecurrentState):
    hidden: float = 0.0


class MixesPaddingIn(Leaky):
    def real(self, valid_B1):
        return torch.ones_like(valid_B1)


class SeesThroughBorders(Leaky):
    def fade(self, reset_B1):
        return torch.tanh(self.rate)


class LeaksOnlyGradients(Leaky):
    """Its reset is right forward, and lets the gradient of the earlier document through."""

    def forward(self, x_BTD, span, state, shared):
        y_BTD, after = super().forward(x_BTD, span, state, shared)
        early_BTD = x_BTD.cumsum(1)
        return y_BTD + early_BTD - early_BTD.detach(), after


class WrongGradient(Leaky):
    def read(self, h_BTD):
        return h_BTD + 0.1 * (h_BTD.detach() - h_BTD)


class WrongOutput(Leaky):
    def read(self, h_BTD):
        return h_BTD * 1.03


class WrongFlops(Leaky):
    def cost(self, context):
        return super().cost(context) + Cost(2, 0, 0)


class WrongBytes(Leaky):
    def cost(self, context):
        return super().cost(context) + Cost(0, context - 1, 0)


class ForgetsARole(Leaky):
    def roles(self):
        return {"output.weight": "matrix"}


class InventsARole(Leaky):
    def roles(self):
        return {"rate": "timescale", "output.weight": "matrix"}


class CountsItsCalls(Leaky):
    """Recomputed, it does something else: the trap of a module flag that is switched between forward and backward."""

    calls = 0

    def read(self, h_BTD):
        self.calls += 1
        return h_BTD * (1 + self.calls % 2)


BREAKERS = [
    ("causal", ReadsTheFuture),
    ("causal", FutureGradient),
    ("causal", IgnoresThePast),
    ("chunked_equals_whole", ForgetsItsState),
    ("chunked_equals_whole", DetachesItsState),
    ("token_by_token_equals_whole", ForgetsItsState),
    ("save_restore", HidesSomeState),
    ("left_padding_changes_nothing", MixesPaddingIn),
    ("document_border_resets", SeesThroughBorders),
    ("document_border_resets", LeaksOnlyGradients),
    ("fast_equals_reference", WrongGradient),
    ("fast_equals_reference", WrongOutput),
    ("cost_exact", WrongFlops),
    ("cost_exact", WrongBytes),
    ("roles_cover_parameters", ForgetsARole),
    ("roles_cover_parameters", InventsARole),
    ("gradient_checkpointing_exact", CountsItsCalls),
]


def toy(kind: type[Leaky]) -> Subject:
    def build(dtype, seed, kind=kind):
        return randomise(kind(), seed).to(dtype)

    return Subject(
        kind.__name__, build, WIDTH, reference=lambda d, s: build(d, s, Leaky), document_state=True
    )


@pytest.mark.parametrize("name", LAWS)
def test_honest_mixer_obeys(name):
    for dtype in LAWS[name].dtypes:
        LAWS[name].check(toy(Leaky), dtype)


@pytest.mark.parametrize(("name", "kind"), BREAKERS)
def test_law_refuses_the_mixer_that_breaks_it(name, kind):
    for dtype in LAWS[name].dtypes:
        with pytest.raises(LawBroken, match=f"^{name}: {kind.__name__} in "):
            LAWS[name].check(toy(kind), dtype)


def test_every_law_is_broken_by_somebody():
    assert {name for name, _ in BREAKERS} == set(LAWS)


def test_laws_say_what_they_need():
    with pytest.raises(ValueError, match="no reference"):
        LAWS["fast_equals_reference"].check(replace(toy(Leaky), reference=None), torch.float32)
    with pytest.raises(ValueError, match="2 bytes"):
        LAWS["cost_exact"].check(toy(Leaky), torch.float32)
