"""A tiny Gemma-4 teacher with all that the real one has, in memory and as it is published, and surgery sections that
fit it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from tiny_gemma4 import VOCABULARY, base_config, build_teacher
from tiny_published import write_published
from trihybrid.models.checkpoint import open_teacher
from trihybrid.storage import digest, piece_writer
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.section import Rwkv7Section, SurgerySection, TicaSection


def build_section(gate: str = "unit", start: str = "fresh", **fields: Any) -> SurgerySection:
    """Blocks of 16 channels; every rank differs from every width."""
    return SurgerySection(
        rwkv7=Rwkv7Section(head_dim=16, decay_rank=6, iclr_rank=5, gate_rank=7, gate=gate),
        tica=TicaSection(heads=4, kv_heads=2, head_dim=8, gate_rank=3, start=start),
        **({"calibration_tokens": 256} | fields),
    )


@pytest.fixture(scope="session")
def make_section() -> Callable[..., SurgerySection]:
    return build_section


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Gemma4TextConfig]:
    return base_config


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., Gemma4ForCausalLM]:
    return build_teacher


@pytest.fixture(scope="session")
def calibration() -> tuple[Tensor, Tensor]:
    """Two rows of two packed documents each: token ids and restarting positions, [2, 40]."""
    generator = torch.Generator().manual_seed(7)
    tokens_BT = torch.randint(3, VOCABULARY, (2, 40), generator=generator)
    positions_BT = torch.cat([torch.arange(17), torch.arange(40 - 17)])[None].expand(2, -1)
    return tokens_BT, positions_BT


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory: options of `write_published` -> its folder, one for all tests; do not change it."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("published") / "teacher"
            write_published(made[key], **options)
        return made[key]

    return make


@pytest.fixture
def plan_of(make_section: Callable) -> Callable[..., dict]:
    def make(folder: Path, gate: str = "unit", start: str = "fresh", **fields: Any) -> dict:
        section = make_section(gate, start, **({"calibration_tokens": 0} | fields))
        return make_plan(open_teacher(folder).base, section, "tiny", contexts=(64,))

    return make


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in pieces of 5,000 bytes: some tensors span several, some pieces hold several tensors."""
    for module in (digest, piece_writer):
        monkeypatch.setattr(module, "PIECE", 5_000)
