"""Legend: D model width, Q query heads, G key/value heads, W channels of a teacher's head, N of a student's, J = W / N
blocks, R = Q / G, T tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trihybrid.surgery.inherit import Heads, fold_norm, ridge_regression, rms
from trihybrid.testing import relative_error

E2B = Heads(query=8, groups=1, width=512, narrow=128, rotary_pairs=64)


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    groups, repeats, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    narrow = 2 * draw(st.integers(1, 4))
    # An even number of channels a head; rotary pairs may fill several blocks.
    pairs = draw(st.integers(0, blocks * narrow // 2))
    return Heads(groups * repeats, groups, blocks * narrow, narrow, pairs)


def projections(case: Heads, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random W_q [Q W, D], W_k [G W, D] and tokens [T, D], float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(case.query * case.width, 12), draw(case.groups * case.width, 12), draw(5, 12)


def teacher_scores(case: Heads, query_QWD: Tensor, key_GWD: Tensor, x_TD: Tensor) -> Tensor:
    """[Q, T, T]: products of all channels of a query head with its key head."""
    q_TQW = (x_TD @ query_QWD.T).view(-1, case.query, case.width)
    k_TGW = (
        (x_TD @ key_GWD.T).view(-1, case.groups, case.width).repeat_interleave(case.query // case.groups, 1)
    )
    return torch.einsum("tqw,sqw->qts", q_TQW, k_TGW)


def student_scores(case: Heads, query_QWD: Tensor, key_GWD: Tensor, x_TD: Tensor) -> Tensor:
    """[Q, T, T]: summed over the blocks that the student's rows make of each teacher's head."""
    q = (x_TD @ query_QWD[case.query_rows()].T).view(len(x_TD), -1, case.narrow)
    k = (x_TD @ key_GWD[case.key_rows()].T).view(len(x_TD), -1, case.narrow)
    k = k.repeat_interleave(case.query // case.groups, 1)
    scores = torch.einsum("thn,shn->hts", q, k)
    repeats = case.query // case.groups
    if case.permuted:
        return scores.view(case.groups, case.blocks, repeats, *scores.shape[1:]).sum(1).flatten(0, 1)
    return scores.view(case.query, case.blocks, *scores.shape[1:]).sum(1)


@settings(max_examples=30)
@given(heads())
def test_blocks_add_up_to_the_teachers_scores(case: Heads) -> None:
    query, key, x_TD = projections(case)
    expected = teacher_scores(case, query, key, x_TD)
    assert relative_error(student_scores(case, query, key, x_TD), expected) <= 1e-12


@pytest.mark.parametrize(("query", "groups"), [(8, 1), (8, 2)])
def test_plain_blocks_meet_foreign_keys(query: int, groups: int) -> None:
    """The ablation: block (i, j) of the queries is scored against key block i // 2 and not j."""
    permuted = Heads(query, groups, 32, 8, 4)
    plain = Heads(query, groups, 32, 8, 4, permuted=False)
    w_q, w_k, x_TD = projections(permuted)
    expected = teacher_scores(permuted, w_q, w_k, x_TD)
    assert relative_error(student_scores(permuted, w_q, w_k, x_TD), expected) <= 1e-12
    assert relative_error(student_scores(plain, w_q, w_k, x_TD), expected) > 0.5


@settings(max_examples=30)
@given(heads(), st.booleans())
def test_rows_are_permutations(case: Heads, ordered: bool) -> None:
    for rows, count in ((case.query_rows(ordered), case.query), (case.key_rows(ordered), case.groups)):
        assert rows.sort().values.tolist() == list(range(count * case.width))


def test_channel_order_of_e2b() -> None:
    order = E2B.channel_order().tolist()
    assert order[:64] == list(range(64))
    assert order[64:128] == list(range(256, 320))
    assert order[128:] == list(range(64, 256)) + list(range(320, 512))


def test_student_head_of_e2b() -> None:
    """Student query head 8 j + i holds block j of the teacher's head i."""
    rows = E2B.query_rows(ordered=False).view(32, 128)
    for block in range(4):
        for head in range(8):
            assert rows[8 * block + head].tolist() == list(
                range(head * 512 + block * 128, head * 512 + (block + 1) * 128)
            )
    assert E2B.key_rows(ordered=False).tolist() == list(range(512))


@settings(max_examples=30)
@given(heads())
def test_rotary_pairs_stay_in_one_block(case: Heads) -> None:
    block = case.channel_order().argsort() // case.narrow
    pairs = torch.arange(case.rotary_pairs)
    assert torch.equal(block[pairs], block[pairs + case.width // 2])


def test_plain_blocks_keep_the_order_and_cut_pairs() -> None:
    plain = Heads(8, 1, 512, 128, 64, permuted=False)
    assert plain.query_rows().tolist() == list(range(8 * 512))
    block = plain.channel_order() // 128
    assert (block[:64] != block[256:320]).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_are_the_teachers_for_uniform_attention(groups: int) -> None:
    """Where every token has the same weight, the student's W_o W_v is the teacher's: value block j of a head goes
    through the columns of block j."""
    case = Heads(4, groups, 24, 8, 2)
    output_DC = torch.randn(12, 4 * 24, dtype=torch.float64)
    value_CD = torch.randn(groups * 24, 12, dtype=torch.float64)
    mean_D = torch.randn(5, 12, dtype=torch.float64).mean(0)
    teacher = output_DC @ (value_CD @ mean_D).view(groups, 24).repeat_interleave(4 // groups, 0).flatten()
    values = (value_CD[case.key_rows(ordered=False)] @ mean_D).view(-1, 8).repeat_interleave(4 // groups, 0)
    student = output_DC[:, case.query_rows(ordered=False)] @ values.flatten()
    assert relative_error(student, teacher) <= 1e-12


def test_folded_norm_is_the_norm_weight_up_to_its_rms() -> None:
    weight_CD, norm_W = torch.randn(3 * 8, 5, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5
    folded, scale = fold_norm(weight_CD, norm_W, 3)
    assert scale == pytest.approx(norm_W.pow(2).mean().sqrt().item(), rel=1e-12)
    assert relative_error(folded * scale, (weight_CD.view(3, 8, 5) * norm_W[:, None]).flatten(0, 1)) <= 1e-12
    same, one = fold_norm(weight_CD, torch.full((8,), 2.0), 3)
    assert relative_error(same, weight_CD) <= 1e-12 and one == 2.0
    assert fold_norm(weight_CD.bfloat16(), norm_W.bfloat16(), 3)[0].dtype == torch.bfloat16


def test_ridge_regression_is_least_squares_in_the_limit() -> None:
    x_TC, y_TK = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 4, dtype=torch.float64)
    exact = torch.linalg.lstsq(x_TC, y_TK).solution.T
    assert relative_error(ridge_regression(x_TC, y_TK, 1e-14), exact) <= 1e-10
    assert ridge_regression(x_TC, y_TK, 1e12).norm() < 1e-9


def test_ridge_regression_minimises_what_it_says() -> None:
    x_TC, y_TK, penalty = (
        torch.randn(30, 6, dtype=torch.float64),
        torch.randn(30, 4, dtype=torch.float64),
        0.3,
    )
    weight = ridge_regression(x_TC, y_TK, penalty).requires_grad_()
    loss = (x_TC @ weight.T - y_TK).pow(2).sum() + penalty * x_TC.pow(2).sum() / 6 * weight.pow(2).sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-10


def test_ridge_regression_survives_fewer_tokens_than_channels() -> None:
    x_TC, y_TK = torch.randn(4, 20), torch.randn(4, 3)
    weight = ridge_regression(x_TC, y_TK, 1e-3)
    assert weight.dtype == torch.float64 and weight.isfinite().all()
    assert relative_error(x_TC.double() @ weight.T, y_TK.double()) < 0.05


def test_ridge_regression_beats_copying_the_donor_on_held_out_tokens() -> None:
    """The hidden state between donor and reader turns and shrinks: a fit follows, a copied matrix does not."""
    donor_TD = torch.randn(400, 16, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    reader_TD = 0.7 * donor_TD + 0.5 * donor_TD @ turn + 0.1 * torch.randn(400, 16, dtype=torch.float64)
    key_KD = torch.randn(8, 16, dtype=torch.float64)
    fitted = ridge_regression(reader_TD[:200], donor_TD[:200] @ key_KD.T, 1e-3)
    target = donor_TD[200:] @ key_KD.T
    copied_error, fitted_error = (relative_error(reader_TD[200:] @ w.T, target) for w in (key_KD, fitted))
    assert fitted_error < 0.3 < 0.5 < copied_error


def test_rms() -> None:
    assert rms(torch.tensor([[3.0, 4.0], [0.0, 5.0]])) == pytest.approx((50 / 4) ** 0.5, rel=1e-12)
    assert rms(torch.full((1000,), 200.0, dtype=torch.bfloat16)) == pytest.approx(200.0, rel=1e-12)
