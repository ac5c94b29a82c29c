"""Blocks of the kernels by shape: the one place to tune them.

A program holds BLOCK outputs at a time and STEP inputs of each. Those of a stream's product hold all inputs, and go on
to further blocks where there are more than `programs` a processor holds by its registers
(`benchmarks/kernel_resources.py`), so that a block's weights arrive while the one before is summed.
"""

from dataclasses import dataclass

NARROW = 512
"""Inputs or outputs up to which a matrix is one of the narrow ones: those of the per-layer input."""


@dataclass(frozen=True)
class Sizes:
    """BLOCK outputs, warps of a program, and either STEP inputs or programs a processor."""

    block: int
    warps: int
    step: int = 0
    programs: int = 0


# By rows, rounded up to a power of two.
NARROW_PRODUCT = {
    1: Sizes(4, 4, step=512), 2: Sizes(8, 4, step=512), 4: Sizes(4, 4, step=512), 8: Sizes(4, 4, step=512),
}  # fmt: skip
PRODUCT = {
    1: Sizes(2, 4, step=2048), 2: Sizes(2, 4, step=2048), 4: Sizes(2, 4, step=2048), 8: Sizes(2, 4, step=2048),
}  # fmt: skip
NORMED = {
    "gated": {
        1: Sizes(4, 8, programs=2), 2: Sizes(4, 8, programs=1), 4: Sizes(2, 8, programs=2), 8: Sizes(2, 8, programs=1),
    },
    "logits": {
        1: Sizes(4, 8, programs=4), 2: Sizes(4, 8, programs=2), 4: Sizes(4, 8, programs=2), 8: Sizes(2, 8, programs=1),
    },
    "narrow": {
        1: Sizes(2, 4, programs=4), 2: Sizes(2, 4, programs=4), 4: Sizes(1, 8, programs=2), 8: Sizes(1, 8, programs=1),
    },
    "other": {
        1: Sizes(4, 4, programs=4), 2: Sizes(4, 4, programs=3), 4: Sizes(2, 8, programs=2), 8: Sizes(2, 8, programs=1),
    },
}  # fmt: skip
RAISED = Sizes(32, 4)
"""Of `raised`, whose programs hold all ranks of their channels."""


def product_sizes(rows: int, inputs: int) -> Sizes:
    """Of a plain product: attention's output, the MLP's way down, the per-layer input's way back."""
    return (NARROW_PRODUCT if inputs <= NARROW else PRODUCT)[rows]


def normed_sizes(rows: int, outputs: int, finish: str) -> Sizes:
    """Of a product of the stream; `finish` as in `Finish.kind`."""
    if finish in NORMED:
        return NORMED[finish][rows]
    return NORMED["narrow" if outputs <= NARROW else "other"][rows]
