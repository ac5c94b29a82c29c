"""Parts in fewer kernels: what changes, and what does not."""

import copy

import pytest
import torch

from trihybrid.distill.fuse import FusedGemma4MLP, fuse
from trihybrid.models.gemma4.norm import FusedRMSNorm


def test_only_classes_change(make_teacher, make_student, block) -> None:
    teacher = make_teacher()
    student = make_student(teacher)
    before = copy.deepcopy(teacher)
    fuse(student, teacher)
    kinds = {type(module).__name__ for module in teacher.modules()}
    assert {"FusedRMSNorm", "FusedGemma4MLP"} <= kinds and not {"Gemma4RMSNorm", "Gemma4TextMLP"} & kinds
    assert list(teacher.state_dict()) == list(before.state_dict())
    with torch.no_grad():
        found, expected = (
            m(block[0], position_ids=block[1], use_cache=False).logits for m in (teacher, before)
        )
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_mlp_up_to_rounding(make_teacher, make_student) -> None:
    teacher = make_teacher(torch.bfloat16).cuda()
    mlp = teacher.model.layers[0].mlp
    x = torch.randn(40, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = mlp(x)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, slope)[0]
    fuse(make_student(make_teacher()), teacher)
    assert isinstance(mlp, FusedGemma4MLP) and isinstance(teacher.model.norm, FusedRMSNorm)
    found = mlp(x)
    for one, other in ((found, expected), (torch.autograd.grad(found, x, slope)[0], wanted)):
        assert ((one - other).float().norm() / other.float().norm()).item() <= 1e-2
