"""Blocks of the kernels by shape: the one place to tune them.

A program holds BLOCK outputs at a time and STEP inputs of each; those of the stream's products hold all inputs, and go
on to further blocks where there are more than `programs` a processor. Legend: O outputs.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """BLOCK outputs, STEP inputs, warps of a program, and programs a processor at most (0 for as many as blocks)."""

    block: int
    step: int
    warps: int
    programs: int = 0


def product_sizes(rows: int, inputs: int) -> Sizes:
    """Of a plain product: attention's output, the MLP's way down, the per-layer input's way back."""
    if inputs <= 512:
        return Sizes(8 if rows <= 2 else 4, 512 if rows <= 4 else 256, 4)
    if rows <= 2:
        return Sizes(4, 1024, 4)
    return Sizes(2, 1024, 4) if rows <= 4 else Sizes(2, 512, 4)


def normed_sizes(rows: int, outputs: int, finish: str) -> Sizes:
    """Of a product of the stream; `finish` as in `Finish.kind`."""
    if finish == "logits":
        return Sizes(4 if rows <= 4 else 2, 0, 8, 4 if rows <= 2 else 2)
    if finish == "gated":
        return Sizes(4 if rows <= 2 else 2, 0, 8, 4 if rows <= 2 else 2)
    if outputs <= 512:
        return Sizes(2 if rows <= 2 else 1, 0, 4 if rows <= 2 else 8)
    return Sizes(4 if rows <= 2 else 2, 0, 4 if rows <= 2 else 8, 6 if rows <= 2 else 2)


RAISED = Sizes(32, 0, 4)
"""Of `raised`: channels of a program, which holds all ranks."""
