"""A part of a sequence is an affine map of its state, and segments joined by such maps are the sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trihybrid.ops.wkv7 import wkv7
from trihybrid.ops.wkv7.parts import affine_map
from trihybrid.ops.wkv7.segments import segments_for, wkv7_segments
from trihybrid.testing.compare import TOLERANCE, relative_error
from wkv7_cases import NAMES, make, results, two_layers, weights


def assert_segments_equal_reference(
    tensors: list[torch.Tensor], reset: torch.Tensor | None, segments: int, backend: str = "chunked"
) -> None:
    dtype = tensors[3].dtype
    (B, T, H, V), K = tensors[3].shape, tensors[0].shape[-1]
    dresults = weights((B, T, H, V), dtype, 1), weights((B, H, K, V), dtype, 2)
    wide = tuple(x.double() for x in dresults)
    expected = results(wkv7, [x.double() for x in tensors], wide, reset_BT=reset, backend="reference")
    found = results(wkv7_segments, tensors, dresults, reset_BT=reset, segments=segments, backend=backend)
    for name, x, reference in zip(NAMES, found, expected, strict=False):
        assert x.dtype == dtype
        assert (error := relative_error(x, reference)) <= TOLERANCE[dtype], f"{name}: {error:.1e}"


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 60),
    H=st.integers(1, 2),
    K=st.integers(1, 7),
    V=st.integers(1, 7),
    segments=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    resets=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    state=st.booleans(),
    backend=st.sampled_from(["chunked", "reference"]),
    seed=st.integers(0, 1000),
)
def test_segments_equal_the_reference(
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    segments: int,
    dtype: torch.dtype,
    resets: float,
    state: bool,
    backend: str,
    seed: int,
) -> None:
    tensors = make(B, T, H, K, V, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    reset = torch.rand(B, T, generator=generator) < resets if resets else None
    assert_segments_equal_reference(tensors if state else tensors[:6], reset, segments, backend)


@pytest.mark.parametrize("resets", [None, [0], [24], [25], [26], [99], [0, 25, 26, 74, 75]])
def test_documents_that_begin_at_the_borders_of_segments(resets: list[int] | None) -> None:
    reset = None
    if resets is not None:
        reset = torch.zeros(2, 100, dtype=torch.bool)
        reset[0, resets] = True
    assert_segments_equal_reference(make(2, 100, 2, 5, 4, torch.float64), reset, 4)


def test_wide_heads_and_many_segments_in_float32() -> None:
    assert_segments_equal_reference(make(1, 200, 2, 64, 64, torch.float32), None, 7)


def test_repeated_keys_without_decay_in_float32() -> None:
    tensors = make(1, 64, 2, 16, 16, torch.float32)
    unit_key = torch.nn.functional.normalize(torch.ones(1, 64, 2, 16) + 1e-3 * tensors[0], dim=-1)
    tensors[1] = torch.zeros_like(tensors[1])
    tensors[2], tensors[4], tensors[5] = unit_key, -unit_key, unit_key
    assert_segments_equal_reference(tensors, None, 8)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(T=st.integers(1, 40), K=st.integers(1, 8), V=st.integers(1, 8), seed=st.integers(0, 1000))
def test_a_piece_is_an_affine_map_of_its_state(T: int, K: int, V: int, seed: int) -> None:
    *tensors, state = make(2, T, 2, K, V, torch.float64, seed)
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[1, seed % T] = True
    for borders in (None, reset):
        maps, ends = affine_map(*tensors[1:], borders)
        _, final = wkv7(*tensors, state, borders, backend="reference")
        assert relative_error(maps @ state + ends, final) <= 1e-10
    assert not maps[1].any() and maps[0].any()


def test_an_affine_map_by_hand() -> None:
    # F = diag(w) + b a^T and E = k v^T for one token.
    log_w = torch.tensor([0.5, 0.25]).log()
    k, v = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0, 7.0])
    a, b = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 10.0])
    maps, ends = affine_map(*(x.view(1, 1, 1, -1) for x in (log_w, k, v, a, b)))
    torch.testing.assert_close(maps[0, 0], torch.tensor([[0.5, 0.0], [10.0, -9.75]]))
    torch.testing.assert_close(ends[0, 0], torch.tensor([[3.0, 5.0, 7.0], [6.0, 10.0, 14.0]]))


def test_gradients_flow_through_an_affine_map() -> None:
    tensors = [x.requires_grad_() for x in make(1, 6, 1, 3, 2, torch.float64)[1:6]]
    assert torch.autograd.gradcheck(affine_map, tensors)


def test_a_bfloat16_sequence_keeps_its_states_wide() -> None:
    wide = make(2, 90, 2, 16, 16, torch.float64)
    rounded = [x.bfloat16() for x in wide[:6]] + [wide[6].float()]
    dresults = weights(wide[3].shape, torch.bfloat16, 1), weights(wide[6].shape, torch.float32, 2)
    expected = results(
        wkv7, [x.double() for x in rounded], tuple(x.double() for x in dresults), backend="reference"
    )
    found = results(wkv7_segments, rounded, dresults, segments=5)
    for name, x, reference in zip(NAMES, found, expected, strict=True):
        assert x.dtype == (torch.float32 if name in ("final", "state") else torch.bfloat16)
        assert (error := relative_error(x, reference)) <= TOLERANCE[torch.bfloat16], f"{name}: {error:.1e}"
    # The final state has met no rounded state on its way.
    assert relative_error(found[1], expected[1]) <= 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_and_unused_results_change_nothing(autocast: bool) -> None:
    tensors = make(1, 40, 2, 6, 6, torch.float32)
    for dresults in (
        (weights(tensors[3].shape, torch.float32, 1), None),
        (None, torch.ones_like(tensors[6])),
    ):
        expected = results(wkv7, tensors, dresults, backend="reference")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = results(wkv7_segments, tensors, dresults, segments=4)
        for name, x, reference in zip(NAMES, found, expected, strict=True):
            assert relative_error(x, reference) <= 1e-5, name


def test_one_leaf_at_a_time() -> None:
    tensors = make(1, 30, 2, 4, 3, torch.float64)
    do, dfinal = weights(tensors[3].shape, torch.float64, 1), weights(tensors[6].shape, torch.float64, 2)
    expected = results(wkv7, tensors, (do, dfinal))
    for place, name in enumerate(NAMES[2:]):
        leaf = tensors[place].clone().requires_grad_()
        arguments = [*tensors[:place], leaf, *tensors[place + 1 :]]
        for backend in ("chunked", "reference"):
            found = wkv7_segments(*arguments, segments=3, backend=backend)
            (gradient,) = torch.autograd.grad(found, leaf, (do, dfinal))
            assert relative_error(gradient, expected[2 + place]) <= 1e-10, name


def test_results_may_be_changed_in_place() -> None:
    tensors = make(1, 30, 2, 4, 4, torch.float64)
    dresults = weights(tensors[3].shape, torch.float64, 1), weights(tensors[6].shape, torch.float64, 2)

    def in_place(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        o, final = wkv7_segments(*tensors, segments=4)
        return o.mul_(2.0), final.mul_(3.0)

    found = results(in_place, tensors, dresults)
    expected = results(wkv7, tensors, (2.0 * dresults[0], 3.0 * dresults[1]))
    for name, x, reference in zip(NAMES[2:], found[2:], expected[2:], strict=True):
        assert relative_error(x, reference) <= 1e-10, name


def test_two_layers_recomputed_in_the_backward() -> None:
    tensors = make(1, 30, 2, 4, 4, torch.float64)
    dresults = weights(tensors[3].shape, torch.float64, 1), weights(tensors[6].shape, torch.float64, 2)
    found = results(two_layers(wkv7_segments), tensors, dresults, segments=4)
    expected = results(two_layers(wkv7), tensors, dresults)
    for name, x, reference in zip(NAMES, found, expected, strict=True):
        assert relative_error(x, reference) <= 1e-10, name


def test_a_state_that_is_replaced_may_hold_anything() -> None:
    tensors = make(1, 20, 2, 4, 3, torch.float64)
    reset = torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 0] = True
    expected = wkv7(*tensors[:6], None, reset)
    tensors[6].fill_(torch.nan)
    for x, reference in zip(wkv7_segments(*tensors, reset, segments=4), expected, strict=True):
        assert relative_error(x, reference) <= 1e-10


def test_a_second_derivative_is_refused() -> None:
    tensors = [x.requires_grad_() for x in make(1, 8, 1, 2, 2, torch.float64)]
    o, _ = wkv7_segments(*tensors, segments=2)
    (gradient,) = torch.autograd.grad(o.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 32, 4096, 4, 132), 1),  # 128 programs: two segments would fill the GPU, and cost three passes
        ((1, 8, 4096, 4, 132), 8),
        ((1, 8, 100_000, 4, 132), 8),
        ((1, 1, 4096, 4, 132), 32),
        ((1, 1, 1000, 4, 132), 4),
        ((1, 1, 511, 4, 132), 1),
        ((8, 32, 100_000, 4, 132), 1),
    ],
)
def test_how_many_segments(sizes: tuple[int, ...], expected: int) -> None:
    assert segments_for(*sizes) == expected


def test_bad_arguments_are_named() -> None:
    tensors = make(2, 10, 1, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="segments is 0; it must be at least 1"):
        wkv7_segments(*tensors, segments=0)
    with pytest.raises(ValueError, match="processors is 0"):
        segments_for(1, 1, 1, 1, 0)
    for place, name in enumerate(["log_w_BTHK", "k_BTHK", "v_BTHV", "a_BTHK", "b_BTHK"], 1):
        wrong = [*tensors[:place], tensors[place][:, :-1], *tensors[place + 1 :]]
        with pytest.raises(ValueError, match=name):
            wkv7_segments(*wrong, segments=3)
    with pytest.raises(ValueError, match=r"state_BHKV has shape \(2, 1, 2, 1\)"):
        wkv7_segments(*tensors[:6], tensors[6][..., :1], segments=3)
    with pytest.raises(ValueError, match=r"reset_BT has shape \(2, 9\)"):
        wkv7_segments(*tensors, torch.zeros(2, 9, dtype=torch.bool), segments=3)
    with pytest.raises(ValueError, match="r_BTHK has shape"):
        wkv7_segments(tensors[0][0], *tensors[1:], segments=3)
