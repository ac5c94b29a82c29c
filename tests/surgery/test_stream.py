"""The student that is written as a stream is the one that is made in memory, and nothing of an attempt is left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_published import AUDIO, IMAGE, TOWERS, VIDEO
from trihybrid.models.checkpoint import load_model, load_teacher, open_teacher
from trihybrid.storage.digest import matches
from trihybrid.storage.tensor_files import TensorRange
from trihybrid.surgery import ahead
from trihybrid.surgery.operate import operate, read_plan, save_student
from trihybrid.surgery.stream import stream_student
from trihybrid.surgery.tensors import TensorReport

FOLDER = "student"


def write(folder: Path, plan: dict, out: Path, **options: Any) -> TensorReport:
    return stream_student(open_teacher(folder), plan, out, **options)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in wanted.items()
    )


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("layout", "dtype", "text"),
    [
        ({}, torch.bfloat16, False),
        ({}, torch.float32, True),
        ({"shards": 3}, torch.float32, False),
        ({"shards": 3}, torch.bfloat16, True),
        ({"text_only": True}, torch.bfloat16, True),
        ({"text_only": True}, torch.float32, False),
    ],
)
def test_the_stream_is_the_operation_in_memory_to_the_bit(
    published, plan_of, calibration, tmp_path, layout, dtype, text
) -> None:
    folder = published(dtype=dtype, **layout)
    plan = plan_of(folder, calibration_tokens=256 * text)
    tokens = [calibration] if text else []
    write(folder, plan, tmp_path / FOLDER, tokens=tokens)
    student = operate(load_teacher(folder), plan, tokens)
    save_student(student, plan, tmp_path / "memory")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in (FOLDER, "memory"))
    assert same(found, wanted)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in (FOLDER, "memory")]
    assert configs[0] == configs[1]
    assert configs[0]["dtype"] == str(dtype).removeprefix("torch.")
    loaded = load_model(tmp_path / FOLDER)
    assert same(loaded.state_dict(), student.state_dict())
    assert read_plan(tmp_path / FOLDER) == plan
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)
    told = loaded.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert told.shape == (1, 15)


@pytest.mark.parametrize(
    "fields",
    [
        {"donor_keys_values": "ridge", "calibration_tokens": 256},
        {"donor_keys_values": "share", "share_kv": "teacher"},
        {"start": "inherited", "heads": "plain", "gate": "published"},
        {"pattern": "SSRSSFSSF"},
        {"pattern": "SSFSSFSSF"},
    ],
    ids=lambda fields: str(fields.get("pattern", fields.get("donor_keys_values", fields.get("start")))),
)
def test_every_kind_of_plan_is_the_same_in_memory(published, plan_of, calibration, tmp_path, fields) -> None:
    folder = published()
    plan = plan_of(folder, **fields)
    tokens = [calibration] if fields.get("calibration_tokens") else []
    write(folder, plan, tmp_path / FOLDER, tokens=tokens, seed=3)
    student = operate(load_teacher(folder), plan, tokens, seed=3)
    assert same(load_model(tmp_path / FOLDER).state_dict(), student.state_dict())


@pytest.mark.parametrize(
    "shape",
    [
        {"tie_word_embeddings": False, "text_only": True},
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "text_only": True},
        {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 8,
        },
    ],
    ids=["untied", "without per-layer inputs", "experts, keys are values"],
)
def test_other_shapes_of_the_family(published, plan_of, calibration, tmp_path, shape) -> None:
    folder = published(**shape)
    for name, plan, tokens in (
        ("noise", plan_of(folder), []),
        ("text", plan_of(folder, calibration_tokens=256), [calibration]),
    ):
        write(folder, plan, tmp_path / name, tokens=tokens)
        student = operate(load_teacher(folder), plan, tokens)
        assert same(load_model(tmp_path / name).state_dict(), student.state_dict())


def test_keys_and_values_that_no_layer_reads_change_nothing(published, plan_of, tmp_path) -> None:
    """A checkpoint with them (and garbage in them) and one without give the same student."""
    with_them, without = published(), published(unused=False)
    plan = plan_of(with_them)
    reports = [
        write(folder, plan, tmp_path / name) for folder, name in ((with_them, "with"), (without, "without"))
    ]
    assert same(*(load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")))
    assert reports[0].unused == sorted(
        f"model.language_model.layers.{layer}.self_attn.{part}.weight"
        for layer in (6, 7, 8)
        for part in ("k_proj", "v_proj", "k_norm")
    )
    assert reports[1].unused == []


def test_every_tensor_is_accounted_for(published, plan_of, tmp_path) -> None:
    folder = published(shards=3)
    report = write(folder, plan_of(folder), tmp_path / FOLDER)
    student = load_file(tmp_path / FOLDER / "model.safetensors")
    theirs = open_teacher(folder)
    retained = {
        name
        for name in student
        if name in theirs.text and torch.equal(student[name], theirs.text[name].read())
    }
    # The student's tensors: copied, made or fresh, and each once.
    assert report.copied == len(retained)
    parts = [retained, set(report.made), set(report.fresh)]
    assert set().union(*parts) == set(student) and sum(map(len, parts)) == len(student)
    assert all(".rwkv7." in name for name in report.made)
    # The teacher's: copied, made something of, unused, or carried, and each once.
    sources = {
        theirs.names[f"model.layers.{layer}.self_attn.{part}.weight"][0]
        for layer, parts in ((2, "qkvo"), (5, "qkvo"), (8, "qo"))
        for part in [f"{letter}_proj" for letter in parts]
        + [f"{letter}_norm" for letter in parts if letter in "qk"]
    }
    parts = [
        {theirs.names[name][0] for name in retained},
        sources,
        set(report.unused),
        set(report.carried),
    ]
    everything = {names[0] for names in theirs.names.values()} | set(theirs.towers)
    assert set().union(*parts) == everything and sum(map(len, parts)) == len(everything)
    manifest = json.loads((tmp_path / FOLDER / "trihybrid.json").read_text())
    assert manifest["tensors"] == vars(report)


def test_a_stranger_and_an_inherited_owner_that_is_retained(published, plan_of, tmp_path) -> None:
    """Layer 5 stays and lends to a converted layer 8: its tensors are copied and made something of."""
    folder = shutil.copytree(published(), tmp_path / "teacher")
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.surprise": torch.zeros(3)}, path)
    plan = plan_of(folder, pattern="SSFSSFSSR")
    report = write(folder, plan, tmp_path / FOLDER)
    assert [name for name in report.unused if "self_attn" not in name] == ["model.surprise"]
    assert "not used, 10: model.language_model.layers.*.self_attn.k_norm.weight (3)" in report.lines()[2]
    assert "model.surprise (1)" in report.lines()[2]
    student = load_file(tmp_path / FOLDER / "model.safetensors")
    assert "model.layers.5.self_attn.k_proj.weight" in student


@pytest.mark.usefixtures("pieces")
def test_towers_are_carried_untouched_or_left_out(published, plan_of, tmp_path) -> None:
    folder = published()
    plan = plan_of(folder)
    kept = write(folder, plan, tmp_path / "kept")
    left = write(folder, plan, tmp_path / "left", towers=False)
    before = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.startswith(TOWERS)
    }
    assert len(before) > 10
    assert same(load_file(tmp_path / "kept" / "towers" / "model.safetensors"), before)
    assert sorted(path.name for path in (tmp_path / "kept" / "towers").iterdir()) == [
        "config.json",
        "model.safetensors",
        "processor_config.json",
    ]
    for name in ("config.json", "processor_config.json"):
        assert (tmp_path / "kept" / "towers" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "left" / "towers").exists()
    assert (kept.carried, kept.left_out) == (sorted(before), [])
    assert (left.carried, left.left_out) == ([], sorted(before))
    # Both are the same model, and the towers are no part of it.
    assert same(load_model(tmp_path / "kept").state_dict(), load_model(tmp_path / "left").state_dict())
    text = write(published(text_only=True), plan, tmp_path / "text")
    assert (text.carried, text.left_out) == ([], []) and not (tmp_path / "text" / "towers").exists()


def test_digests_of_the_stream_are_those_of_the_files(published, plan_of, tmp_path) -> None:
    write(published(), plan_of(published()), tmp_path / FOLDER)
    manifest = json.loads((tmp_path / FOLDER / "trihybrid.json").read_text())
    on_disk = {str(p.relative_to(tmp_path / FOLDER)) for p in (tmp_path / FOLDER).rglob("*") if p.is_file()}
    assert set(manifest["files"]) == on_disk - {"trihybrid.json"}
    assert "towers/model.safetensors" in on_disk
    assert all(matches(tmp_path / FOLDER / name, wanted) for name, wanted in manifest["files"].items())


def test_tokens_for_media_stay_in_the_configuration_and_are_refused(published, plan_of, tmp_path) -> None:
    write(published(), plan_of(published()), tmp_path / FOLDER)
    fields = json.loads((tmp_path / FOLDER / "config.json").read_text())
    tokens = {"image_token_id": IMAGE, "audio_token_id": AUDIO, "video_token_id": VIDEO}
    assert {name: fields[name] for name in tokens} == tokens
    assert {name: fields["base_config"][name] for name in tokens} == tokens
    student = load_model(tmp_path / FOLDER)
    for name, token in tokens.items():
        ids = torch.tensor([[2, 40, 41], [2, 42, token]])
        with pytest.raises(
            ValueError, match=rf"input_ids hold {token}, the {name}: .* leave them out of the prompt"
        ):
            student(ids)
        with pytest.raises(ValueError, match=rf"input_ids hold {token}, the {name}"):
            student.generate(ids, max_new_tokens=2)


def test_a_generation_configuration_is_the_teachers_or_follows_from_its_configuration(
    published, plan_of, tmp_path
) -> None:
    multimodal = published()
    write(multimodal, plan_of(multimodal), tmp_path / "published")
    name = "generation_config.json"
    assert (tmp_path / "published" / name).read_bytes() == (multimodal / name).read_bytes()
    bare = shutil.copytree(published(text_only=True), tmp_path / "bare")
    (bare / name).unlink()
    write(bare, plan_of(bare), tmp_path / "made")
    made = json.loads((tmp_path / "made" / name).read_text())
    assert (made["bos_token_id"], made["eos_token_id"], made["pad_token_id"]) == (2, 1, 0)


# Memory


def test_no_retained_tensor_is_read_into_memory(
    published, plan_of, calibration, tmp_path, monkeypatch
) -> None:
    """On noise: attentions of converted layers and two norms. On text: layers too, but of the tables only rows."""
    folder = published()
    place_of = {place: name for name, place in open_teacher(folder).text.items()}
    read: set[str] = set()
    plain = TensorRange.read

    def note(self: TensorRange) -> Tensor:
        read.add(place_of[self])
        return plain(self)

    monkeypatch.setattr(TensorRange, "read", note)
    write(folder, plan_of(folder), tmp_path / "noise")
    allowed = tuple(f"model.layers.{layer}.self_attn." for layer in (2, 5, 8))
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in (2, 5, 8)} | {"model.norm.weight"}
    assert {name for name in read if not name.startswith(allowed)} == norms
    read.clear()
    write(folder, plan_of(folder, calibration_tokens=256), tmp_path / "text", tokens=[calibration])
    assert not {name for name in read if "embed" in name}


def test_slots_wait_in_the_memory_that_is_set_aside(published, plan_of, tmp_path, monkeypatch) -> None:
    """One at least; with room for all of them the same file comes out."""
    folder = published()
    plan = plan_of(folder)
    waiting: list[int] = []
    plain = ahead.Ahead.__init__

    def init(self: Any, *arguments: Any) -> None:
        plain(self, *arguments)
        waiting.append(len(self._pending))

    monkeypatch.setattr(ahead.Ahead, "__init__", init)
    for room in (0, 1 << 40):
        monkeypatch.setattr(ahead, "AHEAD_BYTES", room)
        write(folder, plan, tmp_path / str(room))
    assert waiting == [1, 3]
    assert same(*(load_file(tmp_path / str(room) / "model.safetensors") for room in (0, 1 << 40)))
