"""Gemma-4's norm by torch's operator, against transformers'."""

import pytest
import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from trihybrid.models.gemma4.norm import FusedRMSNorm, fuse_norms, fused_norm
from trihybrid.testing import relative_error


def norm_of(width: int, scaled: bool, dtype: torch.dtype = torch.float32) -> Gemma4RMSNorm:
    norm = Gemma4RMSNorm(width, eps=1e-3, with_scale=scaled)
    if scaled:
        norm.weight.data = torch.rand(width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return norm


@pytest.mark.parametrize("scaled", [False, True])
def test_the_operator_is_the_formula(scaled) -> None:
    norm = norm_of(12, scaled)
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found, expected = fused_norm(x, norm.weight if scaled else None, norm.eps), norm(x)
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    assert relative_error(found, expected) <= 1e-6
    gradients = (torch.autograd.grad(y, x, slope)[0] for y in (found, expected))
    assert relative_error(*gradients) <= 1e-6


def test_fusing_changes_no_name_and_off_the_gpu_no_bit() -> None:
    model = torch.nn.Sequential(norm_of(12, True), torch.nn.Linear(12, 12), norm_of(12, False))
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    before, names = model(x), list(model.state_dict())
    fuse_norms(model)
    assert [type(part) for part in model] == [FusedRMSNorm, torch.nn.Linear, FusedRMSNorm]
    assert torch.equal(model(x), before) and list(model.state_dict()) == names


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_on_a_gpu_it_is_transformers_norm_up_to_one_rounding(scaled) -> None:
    norm = norm_of(256, scaled, torch.bfloat16).cuda()
    x = torch.randn(7, 5, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = norm(x)
    fuse_norms(norm)
    found = norm(x)
    slope = torch.randn_like(x)
    assert relative_error(found.float(), expected.float()) <= 4e-3
    gradients = (torch.autograd.grad(y, x, slope)[0].float() for y in (found, expected))
    assert relative_error(*gradients) <= 4e-3
