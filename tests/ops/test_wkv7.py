"""The laws of WKV-7: chunked == reference in outputs, states and every gradient, and what resets and states mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.ops.wkv7 import chunked, wkv7

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
NAMES = ["r", "log_w", "k", "v", "a", "b", "state"]


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    floor = 1e-6 * reference.numel() ** 0.5
    return (x.double() - reference.double()).norm().item() / max(reference.double().norm().item(), floor)


def make(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """r, log_w, k, v, a, b, state as RWKV-7 makes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unit_key = torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
    iclr = torch.sigmoid(normal(B, T, H, K))
    log_w = -0.6065 * torch.sigmoid(2 * normal(B, T, H, K))
    tensors = [
        normal(B, T, H, K),
        log_w,
        0.5 * normal(B, T, H, K),
        normal(B, T, H, V),
        -unit_key,
        unit_key * iclr,
    ]
    return [x.to(dtype) for x in [*tensors, normal(B, H, K, V)]]


def run(
    tensors: list[torch.Tensor], reset: torch.Tensor | None, backend: str, seed: int = 1
) -> list[torch.Tensor]:
    """Outputs, final state, and the gradients of a random function of both for all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    o, final = wkv7(*leaves, reset_BT=reset, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, final)]
    loss = (o * weights[0]).sum() + (final * weights[1]).sum()
    return [o.detach(), final.detach(), *torch.autograd.grad(loss, leaves)]


def assert_chunked_equals_reference(
    tensors: list[torch.Tensor], reset: torch.Tensor | None = None, tolerance: float | None = None
) -> None:
    dtype = tensors[3].dtype
    reference = run([x.double() for x in tensors], reset, "reference")
    fast = run(tensors, reset, "chunked")
    for name, x, expected in zip(["o", "final", *NAMES], fast, reference, strict=True):
        assert x.dtype == dtype
        error = relative_error(x, expected)
        assert error <= (tolerance or TOLERANCE[dtype]), f"{name}: {error:.2e}"


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 70),
    H=st.integers(1, 3),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    resets=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    seed=st.integers(0, 1000),
)
def test_chunked_equals_reference(
    B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype, resets: float, seed: int
) -> None:
    tensors = make(B, T, H, K, V, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    reset = torch.rand(B, T, generator=generator) < resets if resets else None
    assert_chunked_equals_reference(tensors, reset)


@pytest.mark.parametrize("length", [4, 16, 32])
@pytest.mark.parametrize("floats", [1, 300, 10_000])
def test_chunk_length_and_blocks_change_nothing(
    length: int, floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_LENGTH", length)
    monkeypatch.setattr(chunked, "BLOCK_FLOATS", floats)
    reset = torch.zeros(3, 75, dtype=torch.bool)
    reset[0, [20, 32, 33, 70]] = True
    reset[2, 0] = True
    tensors = make(3, 75, 3, 4, 6, torch.float64)
    assert_chunked_equals_reference(tensors)
    assert_chunked_equals_reference(tensors, reset)


def test_wide_heads_in_float32() -> None:
    assert_chunked_equals_reference(make(1, 130, 2, 64, 64, torch.float32))


def test_without_a_state_it_starts_from_zeros() -> None:
    *tensors, state = make(2, 21, 2, 4, 3, torch.float64)
    o, final = wkv7(*tensors)
    o_zero, final_zero = wkv7(*tensors, torch.zeros_like(state), backend="reference")
    assert relative_error(o, o_zero) <= 1e-10
    assert relative_error(final, final_zero) <= 1e-10


def test_one_step_by_hand() -> None:
    # S = [[2, 0], [0, 3]], u = S^T a = (2, 0); decay halves the first row; b u^T adds to the second row.
    r, k, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([5.0, 7.0])
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 10.0])
    log_w = torch.tensor([0.5, 1.0]).log()
    state = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    token = [x.view(1, 1, 1, 2) for x in (r, log_w, k, v, a, b)]
    for backend in ("reference", "chunked"):
        o, final = wkv7(*token, state.view(1, 1, 2, 2), backend=backend)
        torch.testing.assert_close(final.view(2, 2), torch.tensor([[6.0, 7.0], [20.0, 3.0]]))
        torch.testing.assert_close(o.view(2), torch.tensor([46.0, 13.0]))


@pytest.mark.parametrize("log_w", [0.0, -1e-4])
def test_repeated_keys(log_w: float) -> None:
    """One key for all tokens, replaced completely (iclr 1), with almost no decay: a Neumann inverse fails here."""
    tensors = make(1, 64, 2, 16, 16, torch.float32)
    unit_key = torch.nn.functional.normalize(torch.ones(1, 64, 2, 16) + 1e-3 * tensors[0], dim=-1)
    tensors[1] = torch.full_like(tensors[1], log_w)
    tensors[2], tensors[4], tensors[5] = unit_key, -unit_key, unit_key
    assert_chunked_equals_reference(tensors)


@pytest.mark.parametrize("log_w", [-2.9, -5.0, -7.0, -25.0, -59.0])
def test_strong_decay_stays_finite_and_right(log_w: float) -> None:
    tensors = make(2, 40, 2, 8, 8, torch.float32)
    tensors[1] = torch.full_like(tensors[1], log_w)
    # Channels that forget at once beside channels that forget nothing.
    tensors[1][..., ::3] = -1e-3
    assert_chunked_equals_reference(tensors)
    tensors[1] = torch.full_like(tensors[1], log_w)
    assert_chunked_equals_reference(tensors)
    # Without a gradient the chunks stay in float32 down to log_w = -40.
    exact = wkv7(*(x.double() for x in tensors), backend="reference")
    for x, expected in zip(wkv7(*tensors, backend="chunked"), exact, strict=True):
        assert relative_error(x, expected) <= 1e-6


def test_decay_out_of_range_is_an_error_of_the_chunked_backend_alone() -> None:
    tensors = make(1, 5, 1, 2, 2, torch.float32)
    tensors[1][0, 3] = -301.0
    with pytest.raises(ValueError, match=r"log_w_BTHK lies in -301 .*-300 \.\. 300.*backend='reference'"):
        wkv7(*tensors, backend="chunked")
    assert wkv7(*tensors, backend="reference")[0].isfinite().all()
    # At the first token of a document it acts on nothing.
    reset = torch.tensor([[False, False, False, True, False]])
    tensors[1][0, 3] = -torch.inf
    assert_chunked_equals_reference(tensors, reset)


@pytest.mark.parametrize("resets", [False, True])
def test_gradcheck(resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_LENGTH", 4)
    tensors = [x.requires_grad_() for x in make(1, 7, 1, 3, 2, torch.float64)]
    reset = torch.tensor([[0, 0, 1, 0, 0, 1, 0]]).bool() if resets else None
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, reset_BT=reset, backend="chunked"), tensors)


def test_a_second_derivative_is_refused() -> None:
    tensors = [x.requires_grad_() for x in make(1, 5, 1, 2, 2, torch.float64)]
    o, _ = wkv7(*tensors, backend="chunked")
    (gradient,) = torch.autograd.grad(o.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_for_some_arguments_and_of_one_result() -> None:
    tensors = make(1, 20, 1, 4, 4, torch.float64)
    expected = run(tensors, None, "reference")
    k = tensors[2].clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected[:2]]
    o, final = wkv7(*tensors[:2], k, *tensors[3:], backend="chunked")
    parts = [
        torch.autograd.grad((x * w).sum(), k, retain_graph=True)[0]
        for x, w in zip((o, final), weights, strict=True)
    ]
    assert relative_error(parts[0] + parts[1], expected[4]) <= 1e-10


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("borders", [[0, 13, 29], [0, 16, 32, 47], [0, 5, 6, 7, 15]])
def test_packed_documents_equal_separate_ones(backend: str, borders: list[int]) -> None:
    tensors = make(2, 50, 2, 5, 4, torch.float64)
    reset = torch.zeros(2, 50, dtype=torch.bool)
    reset[:, borders] = True
    packed, packed_final = wkv7(*tensors, reset_BT=reset, backend=backend)
    ends = [*borders[1:], 50]
    alone = [
        wkv7(*(x[:, i:j] for x in tensors[:6]), backend=backend) for i, j in zip(borders, ends, strict=True)
    ]
    assert relative_error(packed, torch.cat([o for o, _ in alone], dim=1)) <= 1e-10
    assert relative_error(packed_final, alone[-1][1]) <= 1e-10


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_document_that_starts_at_once_ignores_the_state_whatever_it_holds(backend: str) -> None:
    *tensors, state = make(2, 20, 1, 3, 3, torch.float64)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[1, 0] = True
    clean, _ = wkv7(*tensors, state, backend=backend)
    alone, _ = wkv7(*(x[1:] for x in tensors), backend=backend)
    state[1] = torch.nan
    o, _ = wkv7(*tensors, state, reset, backend=backend)
    assert relative_error(o[:1], clean[:1]) <= 1e-10
    assert relative_error(o[1:], alone) <= 1e-10


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("split", [1, 16, 23, 44])
def test_a_carried_state_continues_the_sequence(backend: str, split: int) -> None:
    *tensors, state = make(2, 45, 2, 5, 4, torch.float64)
    whole, whole_final = wkv7(*tensors, state, backend=backend)
    first, carried = wkv7(*(x[:, :split] for x in tensors), state, backend=backend)
    second, final = wkv7(*(x[:, split:] for x in tensors), carried, backend=backend)
    assert relative_error(torch.cat((first, second), dim=1), whole) <= 1e-10
    assert relative_error(final, whole_final) <= 1e-10


def test_a_later_token_moves_nothing_earlier() -> None:
    *tensors, state = make(1, 40, 2, 4, 4, torch.float64)
    before, _ = wkv7(*tensors, state, backend="chunked")
    changed = [torch.cat((x[:, :25], -0.5 * x[:, 25:].abs()), dim=1) for x in tensors]
    after, _ = wkv7(*changed, state, backend="chunked")
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25], after[:, 25])


def test_bfloat16_values_are_computed_in_float32() -> None:
    tensors = [x.bfloat16() for x in make(2, 33, 2, 8, 8, torch.float64)]
    exact, exact_final = wkv7(*(x.double() for x in tensors), backend="reference")
    o, final = wkv7(*tensors)
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert relative_error(o, exact) <= 4e-3
    assert relative_error(final, exact_final) <= 1e-5


def test_autocast_changes_nothing() -> None:
    tensors = make(1, 40, 2, 8, 8, torch.float32)
    plain = run(tensors, None, "chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(tensors, None, "chunked")
    assert all(torch.equal(x, y) for x, y in zip(plain, cast, strict=True))


def test_views_in_any_layout_are_read() -> None:
    tensors = make(2, 37, 3, 4, 6, torch.float64)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:6]]
    strided.append(tensors[6].mT.contiguous().mT)
    for x, y in zip(run(tensors, None, "chunked"), run(strided, None, "chunked"), strict=True):
        assert relative_error(x, y) <= 1e-12


@pytest.mark.parametrize("T", [1, 20])
def test_arguments_are_not_written(T: int) -> None:
    tensors = make(1, T, 1, 4, 4, torch.float32)
    copies = [x.clone() for x in tensors]
    wkv7(*tensors, reset_BT=torch.ones(1, T, dtype=torch.bool))
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r_BTHK", torch.zeros(2, 0, 2, 4), "r_BTHK has shape .2, 0, 2, 4.*at least 1"),
        ("r_BTHK", torch.zeros(2, 3, 4), "r_BTHK has shape .2, 3, 4.*width"),
        ("k_BTHK", torch.zeros(2, 3, 2, 5), "k_BTHK has shape .2, 3, 2, 5.; expected .2, 3, 2, 4"),
        ("v_BTHV", torch.zeros(2, 4, 2, 4), "v_BTHV has shape .2, 4, 2, 4.; expected .2, 3, 2, 4"),
        ("state_BHKV", torch.zeros(2, 2, 5, 4), "state_BHKV has shape .*expected .2, 2, 4, 4"),
        ("reset_BT", torch.zeros(2, 4, dtype=torch.bool), "reset_BT has shape .2, 4.; expected .2, 3"),
        ("reset_BT", torch.zeros(2, 3), "reset_BT has dtype torch.float32; expected torch.bool"),
        ("a_BTHK", torch.zeros(2, 3, 2, 4, dtype=torch.int64), "a_BTHK has dtype torch.int64"),
        ("b_BTHK", torch.zeros(2, 3, 2, 4, dtype=torch.float64), "b_BTHK has dtype torch.float64"),
        ("b_BTHK", torch.zeros(2, 3, 2, 4, device="meta"), "b_BTHK is on meta; expected cpu"),
        ("backend", "magic", "'wkv7' has no backend 'magic'.*chunked.*reference"),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, message: str) -> None:
    names = ["r_BTHK", "log_w_BTHK", "k_BTHK", "v_BTHV", "a_BTHK", "b_BTHK", "state_BHKV"]
    arguments: dict = dict(zip(names, make(2, 3, 2, 4, 4, torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        wkv7(**{**arguments, name: value})
