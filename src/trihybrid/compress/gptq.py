"""GPTQ: rounding a matrix so that its outputs, and not its weights, come out right.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. The columns of W [R, C] are rounded one after another, those with
the largest inputs first; what a column's rounding did to the outputs X W^T on calibration inputs X is made up for by
the columns that are still free. With H = X^T X + damping and H^-1 = U^T U (U upper triangular), column i leaves

    w_j <- w_j - (w_i - q_i s) U_ij / U_ii    for every later column j,

which is the least-squares answer. Columns go in blocks, so that most of this is a matrix product. Where inputs are
uncorrelated, U is diagonal and nothing but rounding to nearest is left.

Legend: N matrices of one shape, R rows (outputs), C columns (inputs), J columns of one block.
"""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from trihybrid.mixers.span import Span
from trihybrid.models.compact.model import CompactModel
from trihybrid.ops.fake_quantize import integer_range

BLOCK = 128
DAMPING = 0.01

logger = logging.getLogger(__name__)


def round_to_nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clamp(round(w / s)) as int8, [..., R, C], in float32; scale is [..., R], above 0."""
    low, high = integer_range(bits)
    return torch.clamp(torch.round(weight.float() / scale.float()[..., None]), low, high).to(torch.int8)


def gptq_round(
    weight_NRC: Tensor, moment_NCC: Tensor, scale_NR: Tensor, bits: int, damping: float = DAMPING
) -> Tensor:
    """The integers of N matrices, int8 [N, R, C], on the device of the weights.

    weight_NRC: [N, R, C], finite; rounded in float32.
    moment_NCC: [N, C, C], X^T X of each matrix's inputs, symmetric and positive semidefinite; factored in float64. A
        column whose input was always zero is rounded to nearest.
    scale_NR: [N, R], above 0.
    damping: share of the mean diagonal that is added to the diagonal, above 0.
    ValueError when the moments are not finite.
    """
    if not bool(torch.isfinite(moment_NCC).all()):
        raise ValueError("calibration: the inputs of a projection are not finite; has the training diverged?")
    columns = weight_NRC.shape[2]
    order_NC = moment_NCC.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    rows_NRC = order_NC[:, None].expand(weight_NRC.shape)
    remaining_NRC = weight_NRC.float().gather(2, rows_NRC)
    feedback_NCC = _feedback(moment_NCC, order_NC, damping)
    scale_NR = scale_NR.float()
    chosen_NRC = torch.empty(weight_NRC.shape, dtype=torch.int8, device=weight_NRC.device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block_NRJ = remaining_NRC[:, :, start:stop].clone()
        error_NRJ = torch.empty_like(block_NRJ)
        for column in range(stop - start):
            weight_NR1 = block_NRJ[:, :, column : column + 1]
            integers_NR1 = round_to_nearest(weight_NR1, scale_NR, bits)
            error_NR1 = weight_NR1 - integers_NR1 * scale_NR[..., None]
            chosen_NRC[:, :, start + column] = integers_NR1[..., 0]
            error_NRJ[:, :, column] = error_NR1[..., 0]
            row_N1J = feedback_NCC[:, start + column, None, start + column + 1 : stop]
            block_NRJ[:, :, column + 1 :].baddbmm_(error_NR1, row_N1J, alpha=-1)
        remaining_NRC[:, :, stop:].baddbmm_(error_NRJ, feedback_NCC[:, start:stop, stop:], alpha=-1)
    return torch.empty_like(chosen_NRC).scatter_(2, rows_NRC, chosen_NRC)


def _feedback(moment_NCC: Tensor, order_NC: Tensor, damping: float) -> Tensor:
    """U_ij / U_ii in the given order of columns, float32 [N, C, C]."""
    moment_NCC = moment_NCC.double()
    size = moment_NCC.shape[1]
    rows_NCC = order_NC[:, :, None].expand(-1, -1, size)
    ordered_NCC = moment_NCC.gather(1, rows_NCC).gather(2, rows_NCC.mT)
    mean_N = ordered_NCC.diagonal(dim1=1, dim2=2).mean(1)
    # Inputs that were all zero leave nothing to weigh columns by: the identity, which is rounding to nearest.
    damp_N = torch.where(mean_N > 0, damping * mean_N, 1.0)
    ordered_NCC.diagonal(dim1=1, dim2=2).add_(damp_N[:, None])
    # H = R R^T with R upper triangular is Cholesky's from the last column on, and then U = R^-1.
    root_NCC = torch.linalg.cholesky(ordered_NCC.flip(1, 2)).flip(1, 2)
    identity_CC = torch.eye(size, dtype=torch.float64, device=moment_NCC.device)
    upper_NCC = torch.linalg.solve_triangular(root_NCC, identity_CC.expand_as(root_NCC), upper=True)
    return (upper_NCC / upper_NCC.diagonal(dim1=1, dim2=2)[:, :, None]).float()


@torch.no_grad()
def input_moments(
    model: CompactModel, batches: Iterable[tuple[Tensor, Span]], tokens: int
) -> dict[str, Tensor]:
    """X^T X of the inputs of every projection, by module name, float64 [C, C] on the model's device.

    batches: (tokens_BT, span) on the model's device; whole batches are read until `tokens` tokens were seen.
    Projections that are fed the same tensor (queries, keys and values of a layer) share one product. The model runs in
    evaluation mode and is left as it was found, without hooks, whatever happens.
    ValueError when there is no batch, or when a projection was never called.
    """
    projections: Mapping[str, nn.Module] = model.projections()
    moments: dict[str, Tensor] = {}
    # The input that came last, kept so that its identity cannot pass to another tensor, and its product.
    latest: list[Tensor] = []

    def keep(name: str, module: nn.Module) -> "torch.utils.hooks.RemovableHandle":
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if not latest or latest[0] is not arguments[0]:
                input_NC = arguments[0].detach().reshape(-1, arguments[0].shape[-1]).float()
                latest[:] = [arguments[0], (input_NC.mT @ input_NC).double()]
            moments[name] = moments[name] + latest[1] if name in moments else latest[1]

        return module.register_forward_pre_hook(hook)

    training, seen = model.training, 0
    handles = [keep(name, module) for name, module in projections.items()]
    model.eval()
    try:
        for tokens_BT, span in batches:
            model.hidden(tokens_BT, span)
            seen += tokens_BT.numel()
            if seen >= tokens:
                break
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("calibration: no batch was given; gptq needs training text, or set gptq: false")
    silent = sorted(set(projections) - set(moments))
    if silent:
        raise ValueError(
            f"calibration: {silent[0]} ({len(silent)} in all) saw no input; pass a model that is not compiled, "
            "or set gptq: false"
        )
    logger.info("calibrated %d projections on %d tokens", len(moments), seen)
    return moments
