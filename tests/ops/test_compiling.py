"""The compiler is told of every operator of ours, by torch versions that need it."""

import pytest
import torch
from torch._inductor import lowering

from trihybrid.ops import mixed_norm, rotary, squared_mlp, window_attention  # noqa: F401
from trihybrid.ops.compiling import name_operators


@pytest.mark.parametrize(("version", "told"), [("2.11.0+cu130", True), ("2.13.0", False)])
def test_operators_are_named_where_torch_would_spell_them_out(
    monkeypatch: pytest.MonkeyPatch, version: str, told: bool
) -> None:
    allowed = type(lowering.FALLBACK_ALLOW_LIST)()
    monkeypatch.setattr(lowering, "FALLBACK_ALLOW_LIST", allowed)
    monkeypatch.setattr(torch, "__version__", version)
    name_operators()
    for name in ("mixed_norm_backward", "normed_rotation", "squared_mlp", "window_attention", "rotary_table"):
        assert (f"trihybrid::{name}" in allowed) is told
    assert all(name.startswith("trihybrid::") for name in allowed)
