"""What `live_tensors` counts, on sizes that can be added up by hand."""

import torch

from trihybrid.testing.live import live_tensors, peak_bytes


def test_counts_what_is_alive_and_the_most_there_was() -> None:
    with live_tensors() as live:
        a = torch.zeros(100)
        b = torch.zeros(50)
        assert live.bytes == 600
        del a
        assert live.bytes == 200
        b += 1
        view = b[:10]
        assert live.bytes == 200 and view.sum() == 10
    assert (live.peak, live.largest) == (600 + 0, 400)


def test_sees_a_backward_pass() -> None:
    """x^2 keeps nothing new for its backward, whose gradient and its twin factor are two more tensors."""
    x = torch.ones(1000, requires_grad=True)
    with live_tensors() as live:
        y = x.pow(2)
        forward = live.peak
        y.backward(torch.ones(1000))
    assert forward == 4000 and live.peak >= 3 * 4000
    assert x.grad is not None and x.grad.sum() == 2000


def test_peak_of_a_call() -> None:
    assert torch.cuda.is_available() or peak_bytes(lambda: torch.zeros(10) + torch.zeros(10)) == 120
