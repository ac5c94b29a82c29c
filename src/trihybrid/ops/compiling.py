"""What torch's compiler should know of our operators before it meets them."""

import torch
from torch._library.custom_ops import OPDEFS


def name_operators() -> None:
    """Tell the compiler that our operators are called as they are.

    Left to find out for itself, torch before 2.13 first writes down the arguments of each operator that it meets, with
    all that they were made from, for a line of a log: in a model of eleven layers that takes minutes.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        return
    from torch._inductor.lowering import FALLBACK_ALLOW_LIST

    for name in OPDEFS:
        if name.startswith("trihybrid::"):
            FALLBACK_ALLOW_LIST.add(name)
