"""Programmatic dependent launch: a kernel begins while the one before it still runs, as far as it can without it.

Weights change at no step, so they may be fetched before `await_former`; what a former kernel writes may be read, and
anything at all be written, only behind it. A kernel that ends has waited for the one before it, so behind
`await_former` all that was launched earlier is there. CUDA programming guide, "Programmatic Dependent Launch and
Synchronization".

Every kernel takes EARLY, the result of `early`, which also goes to its launch as `launch_pdl`: the instructions do not
assemble below compute capability 9.0.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


def early(device: torch.device) -> bool:
    """Whether kernels on this device may begin early: compute capability 9.0 and above."""
    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def await_former(EARLY: tl.constexpr):
    """Wait until all that was launched before has ended and its writes are seen."""
    if EARLY:
        cuda.gdc_wait()


@triton.jit
def admit_next(EARLY: tl.constexpr):
    """Let the next kernel begin as soon as every program has come here."""
    if EARLY:
        cuda.gdc_launch_dependents()
