"""Published folders whose text model stands inside: Gemma 3 from 4B on, and the unified Gemma 4 (12B)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

import tiny_teachers
from random_weights import randomise
from tiny_gemma4 import base_config
from trihybrid.models.checkpoint import load_model, load_teacher, open_teacher
from trihybrid.surgery.operate import operate
from trihybrid.surgery.plan import make_plan
from trihybrid.surgery.stream import stream_student

IMAGE = 90


def gemma3() -> PreTrainedModel:
    config = Gemma3Config(
        # The multimodal class leaves a softcap out; no published Gemma 3 has one.
        text_config=tiny_teachers.teacher_config("gemma3", final_logit_softcapping=None).to_dict(),
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    return Gemma3ForConditionalGeneration(config)


def unified() -> PreTrainedModel:
    fields = base_config(
        attention_k_eq_v=True, num_global_key_value_heads=2, num_kv_shared_layers=0, use_double_wide_mlp=False
    ).to_dict()
    config = Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig.from_dict(fields | {"model_type": "gemma4_unified_text"}),
        vision_config=Gemma4UnifiedVisionConfig(mm_embed_dim=16, mm_posemb_size=8, output_proj_dims=32),
        image_token_id=IMAGE,
    )
    return Gemma4UnifiedForConditionalGeneration(config)


@pytest.fixture(params=[gemma3, unified])
def whole(request) -> PreTrainedModel:
    torch.manual_seed(0)
    model = request.param().eval()
    randomise(model)
    return model


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_inside_is_the_teacher(whole, prefix: str, make_section, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    whole.save_pretrained(folder)
    respell(folder / "model.safetensors", prefix)
    opened = open_teacher(folder)
    assert opened.towers and not opened.strangers
    section = make_section(calibration_tokens=0)
    section.rwkv7.head_dim = 8
    plan = make_plan(opened.base, section, "tiny", contexts=(64,))
    report = stream_student(opened, plan, tmp_path / "student")
    assert report.carried == sorted(opened.towers) and report.unused == []
    # The teacher that is loaded says what the text of the multimodal model says.
    teacher, ids = load_teacher(folder), torch.randint(3, 80, (1, 12))
    with torch.no_grad():
        assert torch.equal(teacher(ids, use_cache=False).logits, whole(input_ids=ids, use_cache=False).logits)
    student, streamed = operate(teacher, plan), load_model(tmp_path / "student")
    wanted, found = student.state_dict(), streamed.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    # Towers lie beside under their published names, and a token for an image is refused.
    towers = load_file(tmp_path / "student" / "towers" / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    assert towers.keys() == opened.towers.keys()
    assert all(torch.equal(towers[name], stored[name]) for name in towers)
    with pytest.raises(ValueError, match=f"input_ids hold {IMAGE}, the image_token_id"):
        streamed(torch.tensor([[2, IMAGE]]))


def respell(path: Path, prefix: str) -> None:
    """Give the text model inside of a file another prefix."""
    found: dict[str, Any] = {}
    for name, tensor in load_file(path).items():
        for old in ("language_model.model.", "model.language_model."):
            if name.startswith(old):
                name = prefix + name.removeprefix(old)
                break
        found[name] = tensor
    save_file(found, path, {"format": "pt"})
    assert json.loads((path.parent / "config.json").read_text())["text_config"]
    assert any(name.startswith(prefix) for name in found)
