"""Values in a teacher's config.json with which no model can be built are refused in one line, by plan and by load."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_teachers import TEACHERS, build_teacher, teacher_config
from trihybrid.models.checkpoint import load_model, load_teacher_config


def write_config(folder: Path, name: str, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(teacher_config(name).to_dict() | changes))
    return str(folder)


@pytest.mark.parametrize("name", TEACHERS)
def test_every_family_is_taken(tmp_path: Path, name: str) -> None:
    assert load_teacher_config(write_config(tmp_path, name)).to_dict() == teacher_config(name).to_dict()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ("llama", {"intermediate_size": -1}, "intermediate_size is -1; it must be at least 1"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; it must be at least 1"),
        ("qwen3", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 4096 are read"),
        ("llama", {"hidden_act": "foo"}, 'hidden_act is "foo"; it must be one of gelu,'),
        ("gemma3", {"hidden_activation": "foo"}, 'hidden_activation is "foo"; it must be one of gelu,'),
        (
            "llama",
            {"rope_parameters": {"rope_type": "foo"}},
            "rope_type of rope_parameters is 'foo'; it must be",
        ),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "foo"}}}, "rope_parameters is 'foo'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "cannot be: Missing required keys"),
        ("mistral-windowed", {"sliding_window": 0}, "sliding_window is 0; layers that slide need one"),
        ("gemma3", {"sliding_window": None}, "sliding_window is None; layers that slide need one"),
        ("qwen3-experts", {"num_experts_per_tok": 5}, "a token uses 5 experts of 4; it must be 1 to 4"),
        ("llama", {"text_config": 5}, "text_config of config.json is no object"),
    ],
)
def test_values_that_cannot_be_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = write_config(tmp_path, name, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher_config(folder)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_a_teacher_with_weights_is_refused_likewise(tmp_path: Path) -> None:
    build_teacher("llama").save_pretrained(tmp_path)
    write_config(tmp_path, "llama", hidden_act="foo")
    with pytest.raises(ValueError, match='hidden_act is "foo"; it must be one of'):
        load_model(tmp_path)
