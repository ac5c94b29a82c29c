"""Drawing and fitting initial weights so that a seed means the same everywhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch's products, of those that the calling thread asks for; as many as before afterwards.

    Sums round otherwise with another number of threads; and for small products the threads only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Torch's generator of the CPU from `seed` on, and one thread; both as they were afterwards."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
