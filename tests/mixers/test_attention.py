"""The attention mixer against its formulas, head by head and token by token."""

import cmath
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trihybrid.mixers.attention import Attention, AttentionOptions
from trihybrid.mixers.contract import Shared, copy_into
from trihybrid.mixers.span import contiguous, from_lengths, padded
from trihybrid.testing import randomise, relative_error

WIDE = torch.float64
OPTIONS = AttentionOptions(12, heads=4, kv_heads=2, head_dim=6, rope_dims=4)


def build(options: AttentionOptions, seed: int = 0, index: int = 1) -> Attention:
    mixer = randomise(Attention(options, index), seed)
    assert isinstance(mixer, Attention)
    return mixer.double()


def turn(x_N: list[float], t: int, options: AttentionOptions) -> list[float]:
    """The first rope_dims channels in pairs (j, j + rope_dims / 2), each turned by t base^(-2j / spacing)."""
    pairs = options.rope_dims // 2
    spacing = options.rope_dims if options.rope_frequencies == "rotated" else options.head_dim
    turned = list(x_N)
    for j in range(pairs):
        angle = t * options.rope_base ** (-2 * j / spacing)
        number = complex(x_N[j], x_N[j + pairs]) * cmath.exp(-1j * angle)
        turned[j], turned[j + pairs] = number.real, number.imag
    return turned


@torch.no_grad()
def by_hand(
    mixer: Attention, x_TD: Tensor, embedding_TGN: Tensor | None, first_TGN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One document: outputs [T, D], and the values [T, G, N] that its queries read."""
    options = mixer.options
    width, length = options.head_dim, len(x_TD)
    queries: list[list[Tensor]] = []
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []

    def normed(x_N: Tensor) -> Tensor:
        return x_N / torch.sqrt((x_N * x_N).sum() / width + 1e-6)

    for t in range(length):
        q_C, k_C, v_C = (p.weight @ x_TD[t] for p in (mixer.query, mixer.key, mixer.value))
        rows = []
        for h in range(options.heads):
            q_N = torch.tensor(
                turn(normed(q_C[h * width : (h + 1) * width]).tolist(), t, options), dtype=WIDE
            )
            rows.append(mixer.gain_H[h] * q_N)
        queries.append(rows)
        keys.append([])
        values.append([])
        for g in range(options.kv_heads):
            part = slice(g * width, (g + 1) * width)
            keys[t].append(torch.tensor(turn(normed(k_C[part]).tolist(), t, options), dtype=WIDE))
            v_N = v_C[part]
            if embedding_TGN is not None:
                v_N = v_N + embedding_TGN[t, g]
            if first_TGN is not None:
                v_N = mixer.residual[0] * first_TGN[t, g] + mixer.residual[1] * v_N
            values[t].append(v_N)
    outputs = []
    for t in range(length):
        oldest = 0 if options.window is None else max(0, t - options.window + 1)
        heads = []
        for h in range(options.heads):
            g = h // (options.heads // options.kv_heads)
            scores = [torch.exp(queries[t][h] @ keys[s][g] / width**0.5) for s in range(oldest, t + 1)]
            read = [score * values[s][g] for s, score in zip(range(oldest, t + 1), scores, strict=True)]
            o_N = torch.stack(read).sum(0) / torch.stack(scores).sum()
            if options.xsa:
                u_N = values[t][g] / values[t][g].norm()
                o_N = o_N - (o_N @ u_N) * u_N
            heads.append(o_N)
        y_D = mixer.output.weight @ torch.cat(heads)
        outputs.append(y_D if mixer.output.scale is None else mixer.output.scale * y_D)
    return torch.stack(outputs), torch.stack([torch.stack(row) for row in values])


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([None, 1, 2, 3, 9]),
    st.sampled_from([0, 2, 4, 6]),
    st.sampled_from(["head", "rotated"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 99),
)
def test_formulas_over_packed_documents(lengths, window, rope_dims, spacing, parts, seed) -> None:
    xsa, value_residual, embedded, output_scale = parts
    torch.manual_seed(seed)
    options = AttentionOptions(
        12, 4, 2, 6, window, rope_dims, 100.0, spacing, xsa=xsa, value_residual=value_residual,
        output_scale=output_scale,
    )  # fmt: skip
    mixer, length = build(options, seed), sum(lengths)
    x_TD = torch.randn(length, 12, dtype=WIDE)
    embedding_TGN, first_TGN = torch.randn(2, length, 2, 6, dtype=WIDE)
    shared = Shared(first_values_BTGD=first_TGN[None])
    if embedded:
        shared.value_embeddings[1] = embedding_TGN[None]
    y_BTD, _ = mixer(x_TD[None], from_lengths(lengths), None, shared)
    expected = []
    for document in torch.arange(length).split(lengths):
        y_TD, _ = by_hand(
            mixer,
            x_TD[document],
            embedding_TGN[document] if embedded else None,
            first_TGN[document] if value_residual else None,
        )
        expected.append(y_TD)
    # Absolute where little is left: of a document of one token XSA leaves rounding alone.
    y_TD = torch.cat(expected).detach()
    assert (y_BTD[0].detach() - y_TD).norm() < 1e-10 * max(1.0, float(y_TD.norm()))


def test_the_first_attention_publishes_its_values_with_their_embedding() -> None:
    first, later = build(OPTIONS, 0, 1), build(replace(OPTIONS, value_residual=True), 1, 2)
    x_TD, embedding_TGN = torch.randn(5, 12, dtype=WIDE), torch.randn(5, 2, 6, dtype=WIDE)
    shared = Shared(value_embeddings={1: embedding_TGN[None]})
    first(x_TD[None], contiguous(1, 5), None, shared)
    y_BTD, _ = later(x_TD[None], contiguous(1, 5), None, shared)
    _, values_TGN = by_hand(first, x_TD, embedding_TGN, None)
    assert shared.first_values_BTGD is not None
    assert relative_error(shared.first_values_BTGD[0], values_TGN) < 1e-10
    assert relative_error(y_BTD[0], by_hand(later, x_TD, None, values_TGN)[0]) < 1e-10


def test_xsa_leaves_nothing_along_the_own_value() -> None:
    mixer = build(replace(OPTIONS, xsa=True))
    with torch.no_grad():
        mixer.output.weight.copy_(torch.eye(12, 24))
    x_TD = torch.randn(7, 12, dtype=WIDE)
    with torch.no_grad():
        y_BTD, _ = mixer(x_TD[None], contiguous(1, 7), None, Shared())
        _, values_TGN = by_hand(mixer, x_TD, None, None)
    for h, head_TN in enumerate(y_BTD[0].split(6, 1)):
        along = (head_TN * values_TGN[:, h // 2]).sum(1)
        assert float(along.abs().max()) < 1e-12
    # The first token reads its own value alone.
    assert float(y_BTD[0, 0].abs().max()) < 1e-12 < float(y_BTD[0, 1].abs().max())


# With a window of 1 XSA leaves nothing of what was read.
@pytest.mark.parametrize(("window", "xsa"), [(None, False), (1, False), (4, False), (None, True), (4, True)])
def test_padding_on_either_side_changes_no_real_token(window: int | None, xsa: bool) -> None:
    mixer = build(replace(OPTIONS, window=window, xsa=xsa))
    x_BTD = torch.randn(2, 9, 12, dtype=WIDE)
    mask_BT = torch.ones(2, 9, dtype=torch.bool)
    mask_BT[0, :4], mask_BT[1, 6:] = False, False
    y_BTD, _ = mixer(x_BTD, padded(mask_BT, 9), None, Shared())
    for row, real in enumerate((slice(4, 9), slice(0, 6))):
        alone_BTD, _ = mixer(
            x_BTD[row : row + 1, real], contiguous(1, real.stop - real.start), None, Shared()
        )
        assert relative_error(y_BTD[row, real], alone_BTD[0]) < 1e-10


@pytest.mark.parametrize("window", [1, 2, 5, 30])
def test_a_window_keeps_one_token_fewer(window: int) -> None:
    mixer = build(replace(OPTIONS, window=window))
    x_BTD = torch.randn(2, 11, 12, dtype=WIDE)
    _, whole = mixer(x_BTD, contiguous(2, 11), None, Shared())
    state = mixer.new_state(2, "cpu", WIDE)
    assert state.length == 0
    for t in range(11):
        _, state = mixer(x_BTD[:, t : t + 1], contiguous(2, 1, t), state, Shared())
        assert state.length == min(t + 1, window - 1)
    assert whole.length == min(11, window - 1)
    assert relative_error(state.keys_BGSD, whole.keys_BGSD) < 1e-10


def test_start() -> None:
    mixer = Attention(replace(OPTIONS, value_residual=True, output_scale=True, query_gain=1.25), 3)
    mixer.initialise(3, 4, copy_into)
    eye = torch.eye(12)
    assert torch.allclose(mixer.query.weight.mT @ mixer.query.weight, eye, atol=1e-5)
    assert torch.allclose(mixer.key.weight @ mixer.key.weight.mT, eye, atol=1e-5)
    assert not mixer.output.weight.any() and bool((mixer.output.scale == 1).all())
    assert mixer.gain_H.tolist() == [1.25] * 4 and mixer.residual.tolist() == [0.5, 0.5]
    assert mixer.kind == "full" and Attention(replace(OPTIONS, window=2), 0).kind == "sliding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, r"attention\.hidden_size is 0; it must be at least 1"),
        ({"heads": 0}, r"attention\.heads is 0"),
        ({"kv_heads": -1}, r"attention\.kv_heads is -1"),
        ({"head_dim": 0}, r"attention\.head_dim is 0"),
        ({"window": 0}, r"attention\.window is 0"),
        ({"heads": 3}, r"attention\.heads is 3; it must be a multiple of attention\.kv_heads, 2"),
        ({"rope_dims": 3}, r"attention\.rope_dims is 3; it must be even and lie in 0 to head_dim, 6"),
        ({"rope_dims": 8}, r"attention\.rope_dims is 8"),
        ({"rope_dims": -2}, r"attention\.rope_dims is -2"),
    ],
)
def test_options_that_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **change)
