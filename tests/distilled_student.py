"""A tiny student whose mixers all say something, and batches of packed documents for its training."""

from typing import Any

import torch
from transformers import Gemma4ForCausalLM

from tiny_gemma4 import VOCABULARY
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
