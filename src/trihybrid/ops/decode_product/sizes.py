"""Blocks of the kernels by shape: the one place to tune them.

Of a row alone a program holds BLOCK outputs at a time and STEP inputs of each. Those of a stream's product hold all
inputs, and go on to further blocks where there are more than `programs` a processor, so that a block's weights arrive
while the one before is summed; `benchmarks/kernel_resources.py` says how many its registers have room for. Of several
rows a program has BLOCK outputs, and each of its warps STEP inputs at a time.

PRODUCT, NORMED and RAISED were chosen by the time of E2B's whole step on an H200, the first two as
`benchmarks/decode_step.py --parts sizes` does. SEVERAL are the first that were tried: those that the search found are
faster by up to 8 % and were not tested on a GPU.
"""

from dataclasses import dataclass, replace

NARROW = 512
"""Inputs or outputs up to which a matrix is one of the narrow ones: those of the per-layer input."""
WIDE = 4096
"""Inputs above which twice the warps hold them: registers would not do."""
FEWEST = 16
"""Inputs, and outputs, that a tensor core takes at a time."""


@dataclass(frozen=True)
class Sizes:
    """BLOCK outputs, warps of a program, and either STEP inputs or programs a processor."""

    block: int
    warps: int
    step: int = 0
    programs: int = 0


PRODUCT = {"narrow": Sizes(4, 1, step=512), "other": Sizes(2, 8, step=2048)}
NORMED = {
    "gated": Sizes(2, 4, programs=4), "logits": Sizes(4, 4, programs=4), "narrow": Sizes(2, 4, programs=4),
    "other": Sizes(4, 4, programs=3),
}  # fmt: skip
SEVERAL = {
    "gated": Sizes(16, 4, step=128), "logits": Sizes(32, 4, step=128), "narrow": Sizes(16, 4, step=128),
    "other": Sizes(16, 8, step=128),
}  # fmt: skip
RAISED = Sizes(64, 4)
"""Of `raised`, whose programs hold all ranks of their channels."""


def product_sizes(inputs: int) -> Sizes:
    """Of a plain product: attention's output, the MLP's way down, the per-layer input's way back."""
    return PRODUCT["narrow" if inputs <= NARROW else "other"]


def normed_sizes(inputs: int, outputs: int, finish: str) -> Sizes:
    """Of a product of the stream; `finish` as in `Finish.kind`."""
    sizes = NORMED[finish if finish in NORMED else "narrow" if outputs <= NARROW else "other"]
    if inputs <= WIDE:
        return sizes
    return replace(sizes, warps=2 * sizes.warps, programs=max(1, sizes.programs // 2))


def several_sizes(inputs: int, outputs: int, finish: str) -> Sizes:
    """Of any product of several rows."""
    return SEVERAL[finish if finish in SEVERAL else "narrow" if min(inputs, outputs) <= NARROW else "other"]
