"""The mean of a loss over tokens, some tokens and a block of the vocabulary at a time, with a gradient by hand.

Each chunk of tokens goes over the vocabulary twice: for the loss, then, with all that a softmax sums up known, for the
gradient, for which a block's logits are computed again. Nothing with V columns is ever whole. The gradient of a scalar
is known up to one factor in the forward, and the backward applies it: what waits for it is [N, D] (and [V, D] where the
head trains).

    tables of [chunk, block] alive at once: 3; where one block is all of the vocabulary, and kept for the gradient, 5 in
    PyTorch and 2 1/2 in the kernels

Shapes: N tokens, C tokens of one chunk, B columns of a block, V vocabulary, D model width.
"""

import torch
from torch import Tensor

from trihybrid.ops.divergence.tables import Head
from trihybrid.ops.divergence.targets import Target


def chunked_mean(
    hidden_ND: Tensor, weight_VD: Tensor, head: Head, weight_N: Tensor, target: Target, chunk: int
) -> Tensor:
    """Sum of weight_N * loss over the tokens, differentiable in hidden_ND and weight_VD (the head's own weight)."""
    # Known here only: inside a Function gradients are off, and needs_input_grad forgets torch.no_grad.
    learns = torch.is_grad_enabled()
    wanted = (learns and hidden_ND.requires_grad, learns and weight_VD.requires_grad)
    # A forward under autocast would round the logits to bfloat16.
    with torch.autocast(device_type=hidden_ND.device.type, enabled=False):
        return _ChunkedMean.apply(hidden_ND, weight_VD, head, weight_N, target, chunk, wanted)


class _ChunkedMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        head: Head,
        weight_N: Tensor,
        target: Target,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        loss_N = torch.empty_like(weight_N, dtype=torch.float64)
        hidden_gradient_ND = torch.zeros_like(hidden_ND, dtype=head.dtype) if wanted[0] else None
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=head.dtype) if wanted[1] else None
        blocks = list(head.blocks())
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_CD = hidden_ND[rows]
            target.begin(rows)
            kept: tuple[Tensor, Tensor | None] | None = None
            for columns in blocks:
                student_CB, own_CB = head.logits(hidden_CD, columns), target.products(columns, again=False)
                if len(blocks) == 1 and any(wanted):
                    kept = student_CB, own_CB
                    if not target.spares(student_CB):
                        student_CB, own_CB = student_CB.clone(), None if own_CB is None else own_CB.clone()
                target.see(student_CB, own_CB, columns)
                del student_CB, own_CB
            loss_N[rows] = target.loss()
            if not any(wanted):
                continue
            weight_C1 = weight_N[rows].unsqueeze(1)
            for columns in blocks:
                if kept is None:
                    student_CB, own_CB = head.logits(hidden_CD, columns), target.products(columns, again=True)
                else:
                    student_CB, own_CB = kept
                error_CB = target.error(student_CB, own_CB, columns, head.error_dtype(hidden_CD))
                del student_CB, own_CB
                # Weights, about 1 / N, come last: in half precision they would push small errors below its range.
                if hidden_gradient_ND is not None:
                    hidden_gradient_ND[rows] += head.back(error_CB, columns) * weight_C1
                if weight_gradient_VD is not None:
                    weighted_CD = (hidden_CD.to(head.dtype) * weight_C1).to(hidden_CD.dtype)
                    head.add_gradient(weight_gradient_VD, error_CB, weighted_CD, columns)
                del error_CB
        ctx.save_for_backward(hidden_gradient_ND, weight_gradient_VD)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype)
        return (loss_N * weight_N.double()).sum().to(head.dtype)

    @staticmethod
    def backward(ctx, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable stays silent when loss_gradient is a constant, and the second derivative would be lost.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked losses have no second derivative; call backward without create_graph=True"
            )
        gradients = [
            None if gradient is None else (gradient * loss_gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None, None)
