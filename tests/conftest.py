"""Every test starts from the same seed, on few threads, with fresh memory full of NaN."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("trihybrid", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("trihybrid")
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch, and let `torch.empty` hand out NaN (the largest number for integers), so that a kernel which
    leaves memory unwritten is found. That comes with torch's deterministic algorithms, which not every CUDA
    operator has, so tests marked gpu go without."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms("gpu" not in request.keywords)
    yield
    torch.use_deterministic_algorithms(False)
