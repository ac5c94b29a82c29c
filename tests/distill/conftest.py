"""A tiny Gemma-4 teacher, a student of it, and batches of packed documents."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from tiny_gemma4 import VOCABULARY, base_config, build_teacher
from trihybrid.data import Batch
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM
from trihybrid.surgery.operate import operate
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.section import Rwkv7Section, SurgerySection, TicaSection


def build_student(
    teacher: Gemma4ForCausalLM, noise: float = 0.05, **fields: Any
) -> TrihybridGemma4ForCausalLM:
    """A student whose TICA says something: its output projection starts at zero, which hides mistakes."""
    section = SurgerySection(
        rwkv7=Rwkv7Section(head_dim=16, decay_rank=6, iclr_rank=5, gate_rank=7),
        tica=TicaSection(heads=4, kv_heads=2, head_dim=8, gate_rank=3),
        **({"calibration_tokens": 256} | fields),
    )
    batch = batch_of(0)
    plan = make_plan(teacher.config, section, "tiny", contexts=(64,))
    student = operate(teacher, plan, [(batch.inputs, batch.positions)])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("tica.o_proj.weight"):
                parameter.copy_(noise * torch.randn(parameter.shape, generator=generator))
    return student


def batch_of(step: int, rows: int = 2, length: int = 24) -> Batch:
    """Packed documents, a pure function of the step; id 2 begins one."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens_BT = torch.randint(3, VOCABULARY, (rows, length + 1), generator=generator)
    tokens_BT[:, 0], tokens_BT[:, 9] = 2, 2
    positions_BT = torch.cat([torch.arange(9), torch.arange(length + 1 - 9)])[None].expand(rows, -1)
    return Batch(tokens_BT, positions_BT)


@pytest.fixture(scope="session")
def make_student() -> Callable[..., TrihybridGemma4ForCausalLM]:
    return build_student


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    return batch_of


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Gemma4TextConfig]:
    return base_config


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., Gemma4ForCausalLM]:
    return build_teacher


@pytest.fixture(scope="session")
def block() -> tuple[Tensor, Tensor]:
    """Two rows of two packed documents each: token ids and restarting positions, [2, 24]."""
    generator = torch.Generator().manual_seed(7)
    tokens_BT = torch.randint(3, VOCABULARY, (2, 24), generator=generator)
    positions_BT = torch.cat([torch.arange(9), torch.arange(24 - 9)])[None].expand(2, -1)
    return tokens_BT, positions_BT
