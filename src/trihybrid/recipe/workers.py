"""The processes of a recipe: this one, or all that torchrun launched. The first of them writes and decides."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import is_torchelastic_launched

from trihybrid.train.distributed import Workers, process_group


@contextmanager
def recipe_workers() -> Iterator[Workers]:
    """This process alone, or all that torchrun launched, each on its own GPU where there are GPUs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not is_torchelastic_launched():
        yield Workers(device=torch.device(device))
        return
    with process_group(device) as workers:
        yield workers
