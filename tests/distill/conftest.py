"""A tiny Gemma-4 teacher, a student of it, and batches of packed documents."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from distilled_student import batch_of, build_student
from tiny_gemma4 import VOCABULARY, base_config, build_teacher
from trihybrid.data import Batch
from trihybrid.models.gemma4 import TrihybridGemma4ForCausalLM


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
