"""Drawing initial weights so that a seed means the same everywhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Torch's generator of the CPU from `seed` on, and one thread; both as they were afterwards.

    The rounding of an orthogonal start depends on the number of threads (and with too many it takes minutes).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
