"""fla-core as a backend: what reaches its kernels, what comes back, and what is said about it."""

import importlib.metadata
import importlib.util
import logging
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from exact_fla import chunk_rwkv7
from trihybrid.ops.backend import backends
from trihybrid.ops.wkv7 import fla, wkv7
from trihybrid.testing import relative_error
from trihybrid.testing.wkv7_cases import answer, differentiate, make_inputs, make_weights

VERSIONS = ("0.6.0", "0.4.1", "9.9.9")


@pytest.fixture(autouse=True)
def installed(request, monkeypatch):
    if "gpu" in request.keywords:
        yield
        return
    for name in ("fla", "fla.ops", "fla.ops.rwkv7"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(chunk_rwkv7=chunk_rwkv7))
    say_version(monkeypatch, VERSIONS[0])
    fla._warn.cache_clear()
    yield
    fla._warn.cache_clear()


def say_version(monkeypatch, version):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "fla-core" else real(name)
    )


@pytest.mark.parametrize("resets", [None, ((0, 4), (3,)), ((), ()), ((0,), (0, 1, 8))])
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("kind", ["random", "repeated_keys"])
def test_documents_states_and_gradients(kind, resets, stateful):
    inputs = make_inputs(kind, (2, 9, 2, 4), dtype=torch.bfloat16)
    inputs[6] = inputs[6] if stateful else None
    reset = None
    if resets is not None:
        reset = torch.zeros(2, 9, dtype=torch.bool)
        for row, starts in enumerate(resets):
            reset[row, list(starts)] = True
    weights = make_weights((2, 9, 2, 4), inputs[3])
    found, expected = (
        results(function, inputs, reset, weights)
        for function in (fla.wkv7_fla, partial(wkv7, backend="reference"))
    )
    for x, y in zip(found, expected, strict=True):
        assert x is y is None or (x.shape == y.shape and x.dtype == y.dtype)
        assert x is None or relative_error(x, y) < 1e-6


def results(function, inputs, reset, weights):
    """Outputs, final state, and all gradients."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    return differentiate(*function(*leaves, reset), leaves, weights)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (VERSIONS[0], "0.6.0: outputs are 0.04 off"),
        (VERSIONS[1], "issues 906 and 1080"),
        (VERSIONS[2], "9.9.9: which nobody has measured"),
    ],
)
def test_what_is_known_is_said_once(monkeypatch, caplog, version, words):
    say_version(monkeypatch, version)
    *tokens, _ = make_inputs("random", (1, 3, 1, 4), dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            fla.wkv7_fla(*tokens)
    assert [words in record.message for record in caplog.records] == [True]


def test_the_only_foreign_backend():
    """`test_backend` holds what foreign means."""
    assert [backend.name for backend in backends("wkv7") if backend.foreign] == ["fla"]


def test_refused_off_a_gpu():
    *tokens, _ = make_inputs("random", (1, 3, 1, 4), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'fla' of operator 'wkv7' is not available on cpu: its kernels are"):
        wkv7(*tokens, backend="fla")


def test_takes_half_precision():
    assert fla.fla_takes(64, 64, torch.bfloat16) is None
    assert "torch.float32" in str(fla.fla_takes(64, 64, torch.float32))


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore::ImportWarning"
)  # fla-core says at its import what else could be installed
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core")
@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_kernels_themselves(stateful, packed):
    """As far off as the benchmark finds them, on two rows with a state and with documents."""
    shape = (2, 200, 2, 64)
    inputs = make_inputs("random", shape, 0, "cuda", torch.bfloat16)
    inputs[6] = inputs[6] if stateful else None
    reset = None
    if packed:
        reset = torch.zeros(shape[:2], dtype=torch.bool, device="cuda")
        reset[0, [0, 70]] = reset[1, [33, 34]] = True
    weights = make_weights(shape, inputs[3])
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    found = differentiate(*wkv7(*leaves, reset, backend="fla"), leaves, weights)
    for x, y in zip(found, answer(inputs, reset, weights), strict=True):
        assert x is None or relative_error(x, y) < 3e-2
