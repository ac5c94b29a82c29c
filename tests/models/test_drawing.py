import pytest
import torch

from trihybrid.models.drawing import drawing


def test_a_seed_means_the_same_and_leaves_no_trace() -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    draws = []
    for seed in (3, 3, 4):
        with drawing(seed):
            assert torch.get_num_threads() == 1
            draws.append(torch.randn(5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with pytest.raises(KeyError), drawing(5):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
