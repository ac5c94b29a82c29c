"""Which revision a configuration means, and what is refused by name."""

import pytest

import published_checkpoint
from trihybrid.export.published.identify import identify

QWEN, _ = published_checkpoint.qwen3("hxa07c")
GEMMA, _ = published_checkpoint.gemma4()


def without(fields: dict, *names: str) -> dict:
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    ("fields", "revision"),
    [
        ({"rwkv_architecture": "hxa079"}, "hxa079"),
        ({"model_type": "rwkv07aqwen3"}, "hxa07a"),
        ({"model_type": "rwkv07b_moe", "num_experts": 4}, "hxa07b"),
        ({"architectures": ["RWKV07DForCausalLM"]}, "hxa07d"),
        ({"architectures": ["RWKV07EMoEForCausalLM"], "num_experts": 4}, "hxa07e"),
        ({"architectures": ["Hrwkv079HybridForCausalLM"]}, "hxa079"),
        ({"auto_map": {"AutoConfig": "configuration_rwkv079qwen3.RWKV079Qwen3Config"}}, "hxa079"),
    ],
)
def test_a_revision_is_read_wherever_it_stands(fields: dict, revision: str) -> None:
    bare = without(QWEN, "rwkv_architecture", "model_type", "architectures", "auto_map")
    found = identify(bare | fields)
    assert found.revision.name == revision
    assert found.teacher == ("qwen3_moe" if "num_experts" in fields else "qwen3")


def test_the_teachers_fields_are_kept_and_the_familys_own_are_not() -> None:
    found = identify(QWEN)
    assert found.base["hidden_size"] == published_checkpoint.WIDTH and found.base["rope_theta"] == 40.0
    assert not {"rwkv_layers", "lora_rank_decay", "nope_in_rwkv", "model_type", "auto_map"} & set(found.base)
    assert found.attention_layers == {2} and found.head_dim == 6 and found.nope


def test_the_text_part_of_a_multimodal_configuration_counts() -> None:
    found = identify(GEMMA)
    assert (found.revision.name, found.teacher, found.rope_base) == ("hxa07i", "gemma4_text", None)
    # Gemma's head_dim is that of its sliding layers, and nothing is known of positions that were taken away.
    assert found.head_dim is None and not found.nope
    assert found.base["hidden_size"] == 32


def test_a_revision_that_is_not_said_can_be_given() -> None:
    silent = without(QWEN, "rwkv_architecture", "architectures", "auto_map") | {"model_type": "mine"}
    with pytest.raises(ValueError, match=r"names no revision; give one of hxa079, .*hxa07i with --revision"):
        identify(silent)
    assert identify(silent, "HXA07D").revision.name == "hxa07d"
    with pytest.raises(
        ValueError, match=r"says different revisions \(rwkv_architecture: \['07b'\], model_type"
    ):
        identify(QWEN | {"rwkv_architecture": "hxa07b"})


@pytest.mark.parametrize("rope", [True, False, None])
def test_positions_follow_the_configuration(rope: bool | None) -> None:
    fields = without(QWEN, "nope_in_rwkv") | ({} if rope is None else {"nope_in_rwkv": not rope})
    assert identify(fields).rope_base == (None if rope is False else 40.0)
    # hxa07d always turns.
    named = {"rwkv_architecture": "hxa07d", "model_type": "x", "architectures": None, "auto_map": None}
    assert identify(fields | named).rope_base == 40.0
    in_v5 = without(fields, "rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}
    assert identify(in_v5).rope_base == (None if rope is False else 9.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "rwkv07i_moe", "architectures": ["RWKV07IMoEForCausalLM"], "base_model": "zai/GLM-4.7-Flash",
             "rwkv_architecture": "hxa07i", "auto_map": None},
            "hxa07i on GLM: it keeps the teacher's multi-head latent attention",
        ),
        ({"kv_lora_rank": 512}, "hxa07c on GLM: .* cannot be read"),
        ({"rwkv_architecture": "hxa07f", "model_type": "rwkv07f_moe", "architectures": None, "auto_map": None},
         "revision 07f: its equations are not public"),
        ({"rwkv_architecture": "cxa073", "model_type": "rwkv", "architectures": None, "auto_map": None},
         "revision 073: its equations are not public, or older"),
        ({"enable_qk_norm": False}, "enable_qk_norm is false: .* only students of Qwen3 and Gemma 4"),
        ({"use_rope_in_tiny_attn": True}, "use_rope_in_tiny_attn is true"),
        ({"use_rope": False}, "nope_in_rwkv is False and use_rope is False, which contradict each other"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 'rope_scaling is of type "yarn"'),
        ({"rope_theta": None}, "rope_theta is missing; hxa07c turns r and k by it"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        identify(QWEN | changes)


def test_a_recurrence_without_positions_refuses_some() -> None:
    with pytest.raises(ValueError, match="use_rope is True; hxa07i has no positions in its recurrence"):
        identify(GEMMA | {"use_rope_in_rwkv": True})
