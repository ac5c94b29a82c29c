"""Mixers over rows in parts are mixers over whole rows: outputs, gradients, the keys and values that others read."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from thread_workers import ThreadWorkers, by_threads
from trihybrid.mixers.contract import Mixer, Shared
from trihybrid.mixers.rwkv7 import Rwkv7, Rwkv7Options
from trihybrid.mixers.span import contiguous, packed, part_of_rows
from trihybrid.mixers.tica import Tica, TicaOptions
from trihybrid.testing import randomise, relative_error

PARTS, LENGTH = 3, 7
RWKV7 = Rwkv7Options(12, heads=4, kv_heads=2, head_dim=6, decay_rank=3, iclr_rank=4, gate_rank=5)
TICA = TicaOptions(12, heads=4, kv_heads=2, head_dim=6, gate_rank=5)
OTHERWISE = {
    "rope_base": 30.0,
    "key_scale": "log_log_decay",
    "value_residual_rank": 4,
    "key_residual_rank": 3,
    "value_lora_rank": 5,
    "bonus": True,
}


def slots_of(name: str) -> list[Mixer]:
    """Two slots, the second of which reads what the first has published."""
    if name == "tica":
        return [Tica(TICA, 0), Tica(TICA, 1, donor=0)]
    if name == "rwkv7":
        return [Rwkv7(RWKV7, 0), Rwkv7(RWKV7, 1, donor=0)]
    options = replace(RWKV7, **OTHERWISE)
    return [Rwkv7(options, 0), Rwkv7(options, 1, first=0)]


def weighed(slots: list[Mixer], x_BTD: Tensor, span: object, weights_BTD: Tensor) -> list[Tensor]:
    """Output, its gradient for the input, and those for all parameters."""
    for slot in slots:
        slot.zero_grad()
    x_BTD = x_BTD.clone().requires_grad_()
    shared, y_BTD = Shared(), x_BTD
    for slot in slots:
        y_BTD = y_BTD + slot(y_BTD, span, None, shared)[0]
    (y_BTD * weights_BTD).sum().backward()
    return [y_BTD.detach(), x_BTD.grad, *(p.grad.clone() for slot in slots for p in slot.parameters())]


@pytest.mark.parametrize("begins", [[], [7], [3, 13, 14, 20]])
@pytest.mark.parametrize("name", ["tica", "rwkv7", "rwkv7 otherwise"])
def test_parts_are_the_whole(name: str, begins: list[int]) -> None:
    slots = [
        [randomise(slot, 3 + place).double() for place, slot in enumerate(slots_of(name))] for _ in range(4)
    ]
    generator = torch.Generator().manual_seed(2)
    x_BTD, weights_BTD = torch.randn(2, 2, PARTS * LENGTH, 12, generator=generator, dtype=torch.float64)
    # One row of one document, one of several.
    edges = [0, *begins, PARTS * LENGTH]
    spread = torch.cat([torch.arange(end - start) for start, end in pairwise(edges)])
    positions_BT = torch.stack([torch.arange(PARTS * LENGTH), spread])
    expected = weighed(slots[-1], x_BTD, packed(positions_BT), weights_BTD)

    def work(workers: ThreadWorkers) -> list[Tensor]:
        part = workers.part()
        own = slice(part.index * LENGTH, (part.index + 1) * LENGTH)
        span = part_of_rows(positions_BT[:, own], part)
        return weighed(slots[part.index], x_BTD[:, own], span, weights_BTD[:, own])

    found = list(zip(*by_threads(PARTS, work), strict=True))
    together = [torch.cat(pieces, 1) for pieces in found[:2]] + [sum(pieces) for pieces in found[2:]]
    for one, wanted in zip(together, expected, strict=True):
        assert relative_error(one, wanted) <= 1e-10


def test_a_part_has_no_state_of_its_own() -> None:
    mixer = randomise(Tica(TICA, 0), 1)
    _, state = mixer(torch.ones(1, 2, 12), contiguous(1, 2), None, Shared())

    def work(workers: ThreadWorkers) -> None:
        span = part_of_rows(torch.arange(2)[None], workers.part())
        with pytest.raises(ValueError, match="state: a part of rows reads what lies before it"):
            mixer(torch.ones(1, 2, 12), span, state, Shared())

    by_threads(1, work)
