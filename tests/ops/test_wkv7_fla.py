"""fla-core as a backend: what reaches its kernels, what comes back, and what is said about it."""

import logging
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from trihybrid.ops.backend import backends
from trihybrid.ops.wkv7 import fla, wkv7
from trihybrid.testing import relative_error
from trihybrid.testing.wkv7_cases import make_inputs

VERSIONS = ("0.6.0", "0.4.1", "9.9.9")


def chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens=None):
    """What fla-core's function of this name is to compute, document by document."""
    assert scale == 1.0 and output_final_state
    if cu_seqlens is None:
        return wkv7(r, w, k, v, a, b, initial_state, backend="reference")
    outputs, states = [], []
    for number, (start, end) in enumerate(pairwise(cu_seqlens)):
        state = None if initial_state is None else initial_state[number : number + 1]
        o, last = wkv7(*(x[:, start:end] for x in (r, w, k, v, a, b)), state, backend="reference")
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 1), torch.cat(states)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(fla.importlib, "import_module", lambda name: SimpleNamespace(chunk_rwkv7=chunk_rwkv7))
    monkeypatch.setattr(fla.importlib.metadata, "version", lambda name: VERSIONS[0])
    fla._warn.cache_clear()
    yield
    fla._warn.cache_clear()


@pytest.mark.parametrize("resets", [None, ((0, 4), (3,)), ((), ()), ((0,), (0, 1, 8))])
@pytest.mark.parametrize("stateful", [True, False])
def test_documents_and_states(resets, stateful):
    *tokens, state = make_inputs("random", (2, 9, 2, 4), dtype=torch.bfloat16)
    state = state if stateful else None
    reset = None
    if resets is not None:
        reset = torch.zeros(2, 9, dtype=torch.bool)
        for row, starts in enumerate(resets):
            reset[row, list(starts)] = True
    found = fla.wkv7_fla(*tokens, state, reset)
    expected = wkv7(*tokens, state, reset, "reference")
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and relative_error(x, y) < 1e-6


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (VERSIONS[0], "0.6.0: outputs are 0.04 off"),
        (VERSIONS[1], "issues 906 and 1080"),
        (VERSIONS[2], "9.9.9: which nobody has measured"),
    ],
)
def test_what_is_known_is_said_once(monkeypatch, caplog, version, words):
    monkeypatch.setattr(fla.importlib.metadata, "version", lambda name: version)
    *tokens, _ = make_inputs("random", (1, 3, 1, 4), dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fla.wkv7_fla(*tokens)
    assert [words in record.message for record in caplog.records] == [True]


def test_never_chosen_unasked():
    assert backends("wkv7")[-1].name == "fla"
    assert [backend.name for backend in backends("wkv7")][-2] == "reference"


def test_refused_off_a_gpu():
    *tokens, _ = make_inputs("random", (1, 3, 1, 4), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'fla' of operator 'wkv7' is not available on cpu: its kernels are"):
        wkv7(*tokens, backend="fla")


def test_takes_half_precision():
    assert fla.fla_takes(64, 64, torch.bfloat16) is None
    assert "torch.float32" in str(fla.fla_takes(64, 64, torch.float32))
